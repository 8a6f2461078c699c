"""Texts as people write them down: what a line may be, what a task makes of it, and that the server reads them as devices do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk import corpus
from edge_sdk.corpus import Entry
from edge_sdk.errors import DataError
from edge_sdk.store import Store
from edge_sdk.tasks import Example, Private, Task
from tests import strategies  # noqa: F401  # its hypothesis profile

TASK = Task(("no", "yes"), "{text}", ((" no",), (" yes",)))
ANSWERS = Task((), "{text}", (), answer_tokens=8)

written = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(str.strip)
labels = st.none() | st.sampled_from(TASK.labels)
entries = st.tuples(written, labels, labels, st.booleans()).map(lambda e: (*e[:3], e[3] and e[1] is not None))


def file(folder: Path, *lines: object) -> Path:
    path = folder / "texts.jsonl"
    path.write_bytes(b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines))
    return path


@given(st.lists(entries, max_size=8), st.booleans())
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, some: list[Entry], short: bool) -> None:
    """Every row comes back in order and as it was, whether keys that say nothing are written out or left away."""
    default = {"label": None, "truth": None, "held_out": False}
    lines = [dict(zip(("text", *default), entry, strict=True)) for entry in some]
    if short:
        lines = [{k: v for k, v in line.items() if k not in default or v != default[k]} for line in lines]

    assert list(corpus.rows(file(tmp_path_factory.mktemp("corpus"), *lines))) == some


def test_rows_come_one_by_one(tmp_path: Path) -> None:
    """What stands before a wrong line is there before the error, which names file and line; empty lines count."""
    rows = corpus.rows(file(tmp_path, {"text": "one"}, b"\n", {"text": "two", "label": "yes"}, b"{]\n"))

    assert [next(rows), next(rows)] == [("one", None, None, False), ("two", "yes", None, False)]
    with pytest.raises(DataError, match=r'texts\.jsonl:4: not a JSON object with "text"'):
        next(rows)


@pytest.mark.parametrize(("key", "other"), [("text", {}), ("label", {"text": "a"}), ("truth", {"text": "a"})])
def test_half_a_character_is_refused(tmp_path: Path, key: str, other: dict[str, str]) -> None:
    """A lone surrogate, which JSON can write and nobody can send on, is named with its line."""
    with pytest.raises(DataError, match=r"texts\.jsonl:1: .*not valid Unicode"):
        list(corpus.rows(file(tmp_path, {**other, key: "\ud800"})))


def test_texts_by_what_they_may_be_used_for() -> None:
    """Labels become indices; a held-out text is never trained on, an unlabelled one keeps its truth for measuring."""
    some: list[Entry] = [
        *(("a", "yes", None, False), ("b", None, "no", False), ("c", "no", None, True)),
        *(("d", None, None, False), ("e", "no", "yes", False)),
    ]

    assert corpus.private(some, TASK) == Private(
        labelled=(Example("a", 1), Example("e", 0)), unlabelled=("b", "d"), truths=(0, None), held_out=(Example("c", 0),)
    )


def test_answers_are_kept_as_they_are_written() -> None:
    """Where answers are texts any label will do, and truths tell nothing."""
    some: list[Entry] = [("2 + 2", "four", "4", False), ("3 + 3", None, "six", False), ("4 + 4", "eight", None, True)]

    assert corpus.private(some, ANSWERS) == Private(
        labelled=(Example("2 + 2", answer="four"),),
        unlabelled=("3 + 3",),
        truths=(None,),
        held_out=(Example("4 + 4", answer="eight"),),
    )


@pytest.mark.parametrize(
    "entry", [("a secret", "maybe", None, False), ("a secret", None, "maybe", False), ("a secret", "maybe", None, True)]
)
def test_another_tasks_label_is_named_without_the_text(entry: Entry) -> None:
    """Label, truth or held out: the labels there are stand beside the wrong one, the private text does not."""
    with pytest.raises(DataError, match="label 'maybe' is not one of this task's: no, yes") as caught:
        corpus.private([("fine", "yes", None, False), entry], TASK)
    assert "secret" not in str(caught.value)


@given(st.lists(entries, max_size=8, unique_by=lambda entry: entry[0].strip()), st.sampled_from([TASK, ANSWERS]))
def test_the_server_reads_what_devices_keep(tmp_path_factory: pytest.TempPathFactory, some: list[Entry], task: Task) -> None:
    """A file means the same to a device that adds it and to a server that names it, but for spaces around the text."""
    store = Store(tmp_path_factory.mktemp("corpus"))
    store.add_all(some)
    kept = store.private(task)
    store.close()

    assert corpus.private([(text.strip(), *rest) for text, *rest in some], task) == kept  # type: ignore[misc]
