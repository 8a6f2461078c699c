"""`edge-agent add` and `status`: what they keep, what they refuse, and what they say."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from edge_sdk.cli import main
from edge_sdk.store import Parcel, Store
from edge_sdk.tasks import Example, Private, Task
from tests import strategies

Capture = pytest.CaptureFixture[str]
Add = Callable[[bytes], int]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "data.jsonl"


@pytest.fixture
def add(home: Path, file: Path) -> Add:
    """Runs `edge-agent add` on a file with this content and returns the exit code."""

    def run(content: bytes) -> int:
        file.write_bytes(content)
        return main(["add", "--home", str(home), str(file)])

    return run


@pytest.fixture
def kept(home: Path) -> Iterator[Callable[[], Private]]:
    """What the store holds."""
    stores: list[Store] = []

    def read() -> Private:
        stores.append(Store(home))
        return stores[-1].private(Task(("no", "yes"), "{text}", ((" no",), (" yes",))))

    yield read
    for store in stores:
        store.close()


def line(**fields: object) -> bytes:
    return json.dumps(fields).encode() + b"\n"


# add ------------------------------------------------------------------------------------------------------------------
def test_lines_become_examples(add: Add, kept: Callable[[], Private], home: Path, capsys: Capture) -> None:
    """Each line is an example of the use its keys say; the last line needs no newline, and null is absent."""
    content = b"".join(
        [
            line(text="known", label="yes"),
            line(text="unknown"),
            line(text="measured", truth="no", label=None),
            line(text="aside é", label="no", held_out=True).rstrip(),
        ]
    )

    assert add(content) == 0
    assert capsys.readouterr() == (f"kept 4 examples in {home}\n", "")
    assert kept() == Private((Example("known", 1),), ("unknown", "measured"), (None, 0), (Example("aside é", 0),))


def test_utf8_and_escapes_are_the_same(add: Add, kept: Callable[[], Private]) -> None:
    """A letter written as itself is the same as the escaped one, and lines may end as on Windows."""
    assert add('{"text":"caf\u00e9"}\r\n{"text":"\\u00e9t\u00e9"}\r\n'.encode()) == 0
    assert kept().unlabelled == ("café", "été")


def test_several_files_are_added_together(home: Path, tmp_path: Path, capsys: Capture) -> None:
    """Files are read one after the other and counted together."""
    (tmp_path / "a").write_bytes(line(text="a") + line(text="b"))
    (tmp_path / "b").write_bytes(line(text="c"))

    assert main(["add", "--home", str(home), str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert capsys.readouterr().out == f"kept 3 examples in {home}\n"


def test_an_empty_file_adds_nothing(add: Add, home: Path, capsys: Capture) -> None:
    """No line is no example and no error."""
    assert add(b"") == 0
    assert capsys.readouterr().out == f"kept 0 examples in {home}\n"


def test_files_of_other_systems_are_read(add: Add, kept: Callable[[], Private]) -> None:
    """A byte order mark, lines ended as on Windows, and empty lines change nothing."""
    body = b"\xef\xbb\xbf" + line(text="a").strip() + b"\r\n\r\n" + line(text="b").strip() + b"\r\n\n"

    assert add(body) == 0
    assert kept().unlabelled == ("a", "b")


@pytest.mark.parametrize(
    "bad",
    [
        b"text\n",
        b'{"text": "a"\n',
        b'{"text": "a"} {"text": "b"}\n',
        b"[]\n",
        b'["text"]\n',
        b'"text"\n',
        b"null\n",
        b"5\n",
        b"{}\n",
        b'{"label": "yes"}\n',
        b'{"text": "\xff"}\n',
        b"\xff\xfe{\x00}\x00\n",
        b"[" * 100_000 + b"\n",
        b"9" * 5000 + b"\n",
    ],
)
def test_a_line_that_is_no_object_with_text_is_named(add: Add, kept: Callable[[], Private], bad: bytes, capsys: Capture) -> None:
    """A wrong line is said with file and number, exit code 1, and nothing of the file is kept."""
    assert add(line(text="good") + bad + line(text="also good")) == 1

    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("edge-agent: ")
    assert 'data.jsonl:2: not a JSON object with "text"' in err
    assert kept().unlabelled == ()


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"text": "a", "lable": "yes"}, "data.jsonl:2: unknown keys lable; allowed: text, label, truth, held_out"),
        ({"text": "a", "z": 1, "b": 2}, "data.jsonl:2: unknown keys b, z; allowed: text, label, truth, held_out"),
        ({"text": None}, "data.jsonl:2: text, label and truth are strings, held_out is true or false"),
        ({"text": 5}, "data.jsonl:2: text, label and truth are strings"),
        ({"text": ["a"]}, "data.jsonl:2: text, label and truth are strings"),
        ({"text": "a", "label": 1}, "data.jsonl:2: text, label and truth are strings"),
        ({"text": "a", "truth": False}, "data.jsonl:2: text, label and truth are strings"),
        ({"text": "a", "label": "yes", "held_out": 1}, "data.jsonl:2: text, label and truth are strings"),
        ({"text": "a", "label": "yes", "held_out": None}, "data.jsonl:2: text, label and truth are strings"),
        ({"text": ""}, "data.jsonl:2: an example needs text"),
        ({"text": " \t\n"}, "data.jsonl:2: an example needs text"),
        ({"text": "a", "held_out": True}, "data.jsonl:2: an example needs text, and a held-out one a label"),
        ({"text": "\ud800"}, "not valid Unicode"),
    ],
)
def test_a_row_that_breaks_a_rule_is_refused(
    add: Add, kept: Callable[[], Private], row: dict[str, object], sentence: str, capsys: Capture
) -> None:
    """Unknown keys, wrong types, empty texts and held-out texts without a label: one sentence, exit code 1, nothing kept."""
    assert add(line(text="good") + line(**row)) == 1

    assert sentence in capsys.readouterr().err
    assert kept().unlabelled == ()


rows = st.dictionaries(
    st.sampled_from(["text", "label", "truth", "held_out", "x"]), strategies.json_values | st.text(), max_size=4
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(b'{"text":"\\ud800"}')
@given(st.binary(max_size=60) | rows.map(lambda row: json.dumps(row).encode()))
def test_no_file_makes_a_traceback(add: Add, content: bytes) -> None:
    """Whatever is in the file, the command ends with 0 or 1 and never with an exception."""
    assert add(content) in {0, 1}


def test_a_file_that_is_not_there_is_an_error(home: Path, tmp_path: Path, capsys: Capture) -> None:
    """A missing file and a folder are said by the system's own sentence, exit code 1."""
    assert main(["add", "--home", str(home), str(tmp_path / "missing.jsonl")]) == 1
    assert "missing.jsonl" in capsys.readouterr().err
    assert main(["add", "--home", str(home), str(tmp_path)]) == 1
    assert "Is a directory" in capsys.readouterr().err


@pytest.mark.parametrize("verb", [["add", "some.jsonl"], ["status"]])
def test_a_damaged_store_is_an_error(home: Path, verb: list[str], capsys: Capture) -> None:
    """A store that is no database is said to be one, by every command, exit code 1."""
    home.mkdir()
    (home / "device.sqlite").write_bytes(b"no database" * 100)

    assert main([verb[0], "--home", str(home), *verb[1:]]) == 1
    assert "device.sqlite cannot be used" in capsys.readouterr().err


# status ---------------------------------------------------------------------------------------------------------------
def test_status_of_a_new_device(home: Path, capsys: Capture) -> None:
    """A device that has done nothing has an id, no examples, nothing to send and no version."""
    Store(home).close()
    assert main(["status", "--home", str(home), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)

    assert len(found.pop("device")) == 32
    assert found == {"labelled": 0, "unlabelled": 0, "held_out": 0, "pending": False, "version": None}


def test_status_counts_what_is_kept(home: Path, add: Add, capsys: Capture) -> None:
    """Examples by use, whether a result waits, and the version held; the same device every time."""
    add(line(text="a", label="yes") + line(text="b") + line(text="c") + line(text="d", label="no", held_out=True))
    store = Store(home)
    store.post(Parcel("type", b"body"))
    store.set_fact("version", "4")
    device = store.device_id
    store.close()
    capsys.readouterr()

    assert main(["status", "--home", str(home), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "device": device,
        "labelled": 1,
        "unlabelled": 2,
        "held_out": 1,
        "pending": True,
        "version": "4",
    }


def test_status_for_people_is_one_fact_a_line(home: Path, capsys: Capture) -> None:
    """Without --json the same facts stand one a line."""
    Store(home).close()
    assert main(["status", "--home", str(home)]) == 0
    lines = capsys.readouterr().out.splitlines()

    assert [fact.split(": ")[0] for fact in lines] == ["device", "labelled", "unlabelled", "held_out", "pending", "version"]
    assert lines[1:] == ["labelled: 0", "unlabelled: 0", "held_out: 0", "pending: False", "version: None"]


@pytest.mark.parametrize("verb", [["status"], ["predict", "a text"]])
def test_a_mistyped_home_makes_no_device(home: Path, verb: list[str], capsys: Capture) -> None:
    """Verbs that only look say that there is nothing, and leave nothing behind."""
    assert main([verb[0], "--home", str(home), *verb[1:]]) == 1
    assert f"there is no device in {home}" in capsys.readouterr().err
    assert not home.exists()


# Arguments ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "arguments", [[], ["dance"], ["add", "file"], ["add", "--home", "h"], ["status"], ["run", "--home", "h"]]
)
def test_wrong_arguments_are_exit_code_two(arguments: list[str], capsys: Capture) -> None:
    """What the command line does not know or lacks is said with the usage, exit code 2, and nothing is made."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)

    assert caught.value.code == 2
    assert "usage: edge-agent" in capsys.readouterr().err
