"""The state on disk now and then, so that a start need not replay every event; never more than a shortcut.

What decides is the event log: a snapshot that is damaged, or that another program wrote, is as good as none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args, get_origin

import msgspec
from immutables import Map

from edge_sdk import cohort, protocol
from edge_server import coordinator, unmasking
from edge_server.coordinator import Event, State
from edge_server.storage import EventLog


def _program() -> str:
    """Names the code that makes a state of events: a program in which any of it is different replays all of them."""
    found = hashlib.sha256()
    for source in (__file__, coordinator.__file__, unmasking.__file__, protocol.__file__, cohort.__file__):
        found.update(Path(source).read_bytes())
    return found.hexdigest()


PROGRAM = _program()


def encode(state: State) -> bytes:
    return msgspec.json.encode(state, enc_hook=_plain)


def decode(body: bytes) -> State:
    """Raises: msgspec.MsgspecError: this is no state."""
    return msgspec.json.decode(body, type=State, dec_hook=_persistent)


def take(log: EventLog, state: State) -> None:
    """Keeps the state after the newest event. Raises: DataError: it is not on disk; nothing is lost but time."""
    log.keep_snapshot(PROGRAM, encode(state))


def replay(log: EventLog, every: int) -> State:
    """The state after all events, taken down where reading it took more than `every` of them."""
    after, state = _newest(log)
    for body in log.read(after):
        state = coordinator.apply(state, msgspec.json.decode(body, type=Event))
    if log.newest - after > every:
        take(log, state)
    return state


def _newest(log: EventLog) -> tuple[int, State]:
    """The number of the event after which the newest good snapshot was taken, and the state it holds."""
    for after, body in log.snapshots(PROGRAM):
        try:
            return after, decode(body)
        except msgspec.MsgspecError:
            continue
    return 0, State()


def _plain(value: Any) -> Mapping[Any, Any]:
    if isinstance(value, MappingProxyType | Map):
        return dict(value)
    raise NotImplementedError(f"a state holds no {type(value).__name__}")


def _persistent(kind: Any, value: Any) -> Map[Any, Any]:
    if get_origin(kind) is not Map:
        raise NotImplementedError(f"a state holds no {kind}")
    plain: Any = dict
    return Map(msgspec.convert(value, plain[get_args(kind)], str_keys=True))
