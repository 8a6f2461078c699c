"""One-time tokens and the devices they admit: what `admission.py` keeps, and what the operator's commands say."""

from __future__ import annotations

import argparse
import contextlib
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_sdk.errors import DataError, SettingsError, WireError
from edge_server import admission as admissions
from edge_server import cli
from edge_server.admission import NAME, Admission, Token, check
from edge_server.failpoints import nothing

DEVICE, OTHER = "ab" * 32, "cd" * 32
NOW = 1000.0
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def admission(tmp_path: Path) -> Iterator[Admission]:
    found = Admission(tmp_path)
    yield found
    found.close()


def refused(code: str, said: str = "") -> Any:
    return pytest.raises(WireError, match=f"^{code}: .*{said}")


# Tokens ---------------------------------------------------------------------------------------------------------------
def test_a_token_admits_one_device_once(admission: Admission) -> None:
    """The device it admitted may repeat it, having lost the answer, and needs none afterwards; nobody else gets in by it."""
    token, text = admission.mint("pi in the kitchen", NOW + 60, NOW)

    admission.admit(DEVICE, text, NOW)
    admission.admit(DEVICE, text, NOW)
    admission.admit(DEVICE, "", NOW + 1000)
    admission.known(DEVICE)
    with refused("bad-token", "is used"):
        admission.admit(OTHER, text, NOW)

    assert admission.tokens() == [Token(token.id, token.sha256, "pi in the kitchen", NOW, NOW + 60, DEVICE)]
    assert admission.devices() == {DEVICE: False}


def test_an_expired_token_admits_nobody(admission: Admission) -> None:
    """From its end on, not before."""
    _, first = admission.mint("", NOW + 60, NOW)
    _, second = admission.mint("", NOW + 60, NOW)

    with refused("bad-token", "is expired"):
        admission.admit(DEVICE, first, NOW + 60)
    admission.admit(DEVICE, second, NOW + 59.9)


def test_a_revoked_token_admits_nobody(admission: Admission) -> None:
    token, text = admission.mint("", NOW + 60, NOW)

    admission.revoke_token(token.id)

    with refused("bad-token", "is revoked"):
        admission.admit(DEVICE, text, NOW)
    assert [each.state(NOW) for each in admission.tokens()] == ["revoked"]


@pytest.mark.parametrize("text", ["x", "-", "00000000-", "ID-", "ID-" + "0" * 32, "ID", "\x00-\x00", "ID-é"])
def test_what_is_no_token_admits_nobody(admission: Admission, text: str) -> None:
    """A guess, and the right id with another secret."""
    token, _ = admission.mint("", NOW + 60, NOW)

    with refused("bad-token", "no token of this server"):
        admission.admit(DEVICE, text.replace("ID", token.id), NOW)
    assert admission.devices() == {}


def test_nobody_is_admitted_without_a_token(admission: Admission) -> None:
    with refused("token-needed"):
        admission.admit(DEVICE, "", NOW)
    with refused("unknown-device"):
        admission.known(DEVICE)


def test_the_hash_of_another_token_is_no_secret() -> None:
    """What is kept admits nobody: whoever reads the file cannot join."""
    token = Token("0" * 8, "ef" * 32, "", NOW, NOW + 60)

    with refused("bad-token"):
        check(token, token.sha256, NOW)


def test_a_token_is_not_kept(admission: Admission, tmp_path: Path) -> None:
    """None of the files holds what was printed."""
    _, text = admission.mint("", NOW + 60, NOW)

    assert all(text.partition("-")[2].encode() not in path.read_bytes() for path in tmp_path.iterdir())


# Devices --------------------------------------------------------------------------------------------------------------
def test_a_device_that_is_shut_out_stays_out(admission: Admission) -> None:
    """Neither by signing, nor by enrolling again, nor by another token."""
    for device in (DEVICE, OTHER):
        admission.admit(device, admission.mint("", NOW + 60, NOW)[1], NOW)
    _, another = admission.mint("", NOW + 60, NOW)

    assert admission.revoke_device(DEVICE[:6]) == DEVICE

    with refused("revoked"):
        admission.known(DEVICE)
    with refused("revoked"):
        admission.admit(DEVICE, another, NOW)
    admission.known(OTHER)
    assert admission.devices() == {DEVICE: True, OTHER: False}


@pytest.mark.parametrize(("id", "count"), [("a", 2), ("b", 0), ("", 0), ("%", 0)])
def test_a_device_is_shut_out_only_if_it_is_the_one(admission: Admission, id: str, count: int) -> None:
    """The beginning of two ids, or of none, names no device."""
    for device in (DEVICE, "ac" * 32):
        admission.admit(device, admission.mint("", NOW + 60, NOW)[1], NOW)

    with pytest.raises(SettingsError, match=f"{count} devices"):
        admission.revoke_device(id)
    assert not any(admission.devices().values())


def test_all_of_it_survives_and_other_processes_see_it(admission: Admission, tmp_path: Path) -> None:
    """Two that have the file open, as the server and a command have, see each other's changes at once."""
    other = Admission(tmp_path)
    _, text = other.mint("", NOW + 60, NOW)

    admission.admit(DEVICE, text, NOW)
    other.known(DEVICE)
    other.revoke_device(DEVICE)
    other.close()

    with refused("revoked"):
        admission.known(DEVICE)


def test_a_damaged_file_is_said(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b"no database" * 100)

    with pytest.raises(DataError, match="restore it from a backup"):
        Admission(tmp_path)


@contextlib.contextmanager
def locked(data: Path) -> Iterator[sqlite3.Connection]:
    """The file while another program changes it, and does not come to an end."""
    with contextlib.closing(sqlite3.connect(data / NAME, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield other


def test_who_only_looks_waits_for_no_change(admission: Admission, tmp_path: Path) -> None:
    """While another process holds the file: members, strangers and lists are answered from what is there."""
    token, text = admission.mint("", NOW + 60, NOW)
    admission.admit(DEVICE, text, NOW)

    with locked(tmp_path) as other:
        other.execute("UPDATE devices SET revoked = 1")
        admission.known(DEVICE)
        assert admission.is_in(DEVICE, "", NOW)
        with refused("token-needed"):
            admission.is_in(OTHER, "", NOW)
        with refused("bad-token", "is used"):
            admission.is_in(OTHER, text, NOW)
        assert [each.id for each in admission.tokens()] == [token.id]
        assert admission.devices() == {DEVICE: False}


def test_a_change_that_finds_the_file_locked_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """A device is asked to come again, the operator told what to do; once the lock is gone it goes on."""
    monkeypatch.setattr(admissions, "PATIENCE", 0.01)
    with contextlib.closing(Admission(tmp_path)) as admission:
        _, text = admission.mint("", 1e12, NOW)
        data = ["--data", str(tmp_path)]

        with locked(tmp_path):
            with refused("busy") as caught:
                admission.admit(DEVICE, text, NOW)
            for verb in (["mint"], ["revoke", text.partition("-")[0]]):
                assert cli.main(["token", *verb, *data]) == 1
                assert f"another program has locked {NAME}; try again" in capsys.readouterr().err
        admission.admit(DEVICE, text, NOW)

    assert (caught.value.status, caught.value.retry_after) == (503, 0.01)
    assert cli.main(["token", "mint", *data]) == 0


@pytest.mark.parametrize("before", ["nothing", "a list", "an empty file", "a token", "a device"])
def test_devices_are_known_once_a_token_was_minted(tmp_path: Path, capsys: Capture, before: str) -> None:
    """On this machine; the file alone, or that somebody looked, is no reason, and looking makes no file."""
    if before == "a list":
        assert cli.main(["token", "list", "--data", str(tmp_path)]) == 2
    elif before != "nothing":
        with contextlib.closing(Admission(tmp_path)) as admission:
            text = "" if before == "an empty file" else admission.mint("", NOW + 60, NOW)[1]
            if before == "a device":
                admission.admit(DEVICE, text, NOW)

    args = argparse.Namespace(host="127.0.0.1", require_tokens=False, data=tmp_path, admin_token_file=None)
    guard = cli._guard(args, nothing)

    assert (guard is not None) == (before in ("a token", "a device"))
    assert (tmp_path / NAME).exists() == (before not in ("nothing", "a list"))


# The commands ---------------------------------------------------------------------------------------------------------
def test_the_operator_mints_lists_and_revokes(tmp_path: Path, capsys: Capture) -> None:
    """The token stands alone on stdout, what to do with it on stderr; lists show states, never secrets."""
    data = ["--data", str(tmp_path / "new")]

    assert cli.main(["token", "mint", *data, "--expires", "1d", "--label", "pi"]) == 0
    minted = capsys.readouterr()
    text = minted.out.strip()
    id = text.partition("-")[0]
    assert f"edge-agent join --home HOME --server URL --token {text}" in minted.err
    assert cli.main(["token", "list", *data]) == 0
    assert capsys.readouterr().out.startswith(f"{id}  open     pi  ")
    assert cli.main(["token", "revoke", id, *data]) == 0
    assert capsys.readouterr().out == f"revoked: token {id}\n"
    assert cli.main(["token", "list", *data, "--json"]) == 0
    row = json.loads(capsys.readouterr().out)

    assert (row["id"], row["state"], row["label"], row["device"]) == (id, "revoked", "pi", "")
    assert cli.main(["token", "revoke", "nothing", *data]) == 2
    assert "there is no token 'nothing'" in capsys.readouterr().err


def test_the_operator_shuts_a_device_out(tmp_path: Path, capsys: Capture) -> None:
    """Revoking a token that is used says how its device is shut out."""
    admission = Admission(tmp_path)
    token, text = admission.mint("", 1e12, NOW)
    admission.admit(DEVICE, text, NOW)
    admission.close()
    data = ["--data", str(tmp_path)]

    assert cli.main(["token", "revoke", token.id, *data]) == 0
    assert "`edge-server device revoke abababababab`" in capsys.readouterr().out
    assert cli.main(["device", "list", *data]) == 0
    assert capsys.readouterr().out == f"{DEVICE}  admitted\n"
    assert cli.main(["device", "revoke", DEVICE[:12], *data]) == 0
    assert cli.main(["device", "list", "--json", *data]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"id": DEVICE, "state": "revoked"}


@pytest.mark.parametrize("expires", ["", "7", "0d", "-1d", "7w", "367d", "1.5h", "99999999m"])
def test_a_wrong_time_mints_nothing(tmp_path: Path, capsys: Capture, expires: str) -> None:
    """Exit code 2, what may be said, and no folder."""
    assert cli.main(["token", "mint", "--data", str(tmp_path / "new"), f"--expires={expires}"]) == 2

    assert "30m, 12h, 7d" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_folder_that_is_not_there_is_not_made_by_a_list(tmp_path: Path, capsys: Capture) -> None:
    assert cli.main(["token", "list", "--data", str(tmp_path / "new")]) == 2

    assert "there is no data folder" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("verb", [["token", "list"], ["token", "revoke", "x"], ["device", "list"], ["device", "revoke", "x"]])
def test_a_file_that_is_not_there_is_not_made_by_looking(tmp_path: Path, capsys: Capture, verb: list[str]) -> None:
    """In any folder; a server that starts there goes on without tokens."""
    assert cli.main([*verb, "--data", str(tmp_path)]) == 2

    assert "no token was ever minted" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
