"""The device's side of the protocol as a state machine: `step(session, event, jitter) -> (session, action)`.

Rules kept here and nowhere else:

1. What waits in the outbox is delivered before new work is asked for, and training that was under way is finished first.
2. A network failure changes nothing but the time: the action is repeated (work is asked for again) after a pause that
   doubles, up to ten minutes, times a random share of it (full jitter), and never sooner than the server's `Retry-After`.
   Whatever the server says, a pause is at least 0.02 seconds where it asks for one, and at most an hour.
3. A refusal that a repeat cannot cure drops the result. The device asks for new work: at once where the result only came too
   late, otherwise after a minute, because the same work would be refused again.
4. Work that fails on the device (no labelled text, no torch) is said in one line and tried again after a minute.

No sockets, clocks or disks: `agent.py` carries the actions out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from edge_sdk.cohort import Request
from edge_sdk.protocol import Evaluate, Finished, Predict, Train, Wait, Work

FIRST_PAUSE = 1.0  # seconds
LONGEST_PAUSE = 600.0
PAUSE_AFTER_FAILED_WORK = 60.0
CAME_LATE = ("already-answered", "too-stale", "too-late", "no-cohort", "wrong-cohort", "cohort-failed", "cohort-full")
SHORTEST_WAIT, LONGEST_WAIT = 0.02, 3600.0  # what a server may ask for


# Events: what happened ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Started:
    """The process came up; `pending` says whether the outbox holds a result, `work` what was being trained when it ended."""

    pending: bool
    work: Train | None = None


@dataclass(frozen=True)
class Assigned:
    work: Work


@dataclass(frozen=True)
class Worked:
    """The result is in the outbox; of a finished run, the adapter is kept."""


@dataclass(frozen=True)
class WorkFailed:
    reason: str


@dataclass(frozen=True)
class Delivered:
    """The server has the result on disk; the outbox is empty."""


@dataclass(frozen=True)
class Rejected:
    """The server will never take this request."""

    code: str


@dataclass(frozen=True)
class NoAnswer:
    """Unreachable, or told to come back after `retry_after` seconds."""

    retry_after: float = 0.0


@dataclass(frozen=True)
class Woke:
    pass


Event = Started | Assigned | Worked | WorkFailed | Delivered | Rejected | NoAnswer | Woke


# Actions: what to do now ----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class AskForWork:
    pass


@dataclass(frozen=True)
class Do:
    """Train, judge, evaluate, take part in secure averaging, or keep the adapter of a finished run."""

    work: Train | Predict | Evaluate | Finished | Request


@dataclass(frozen=True)
class Send:
    """Deliver what the outbox holds."""


@dataclass(frozen=True)
class Drop:
    """Empty the outbox without delivering, then report `Woke`."""

    code: str


@dataclass(frozen=True)
class Sleep:
    seconds: float


@dataclass(frozen=True)
class Stop:
    """The run is over, and its adapter is kept."""


Action = AskForWork | Do | Send | Drop | Sleep | Stop


@dataclass(frozen=True)
class Session:
    """Where the device stands: the action under way, and how often in a row the network failed it."""

    doing: Action
    after_sleep: Action | None = None
    failures: int = 0


def pause(failures: int, jitter: float) -> float:
    """Seconds before the next try after `failures` failures in a row; `jitter` is uniform in [0, 1)."""
    return float(min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(failures, 30))) * jitter


def step(session: Session, event: Event, jitter: float) -> tuple[Session, Action]:
    """One transition.

    Args:
        jitter: a fresh number in [0, 1).

    Raises:
        ValueError: `event` cannot follow the action under way: a bug of the shell.
    """
    match session.doing, event:
        case _, Started(pending=True):
            return _to(Send())
        case _, Started(work=Train() as work):
            return _to(Do(work))
        case _, Started():
            return _to(AskForWork())
        case AskForWork(), Assigned(Wait(seconds)):
            return _sleep(min(max(seconds, SHORTEST_WAIT), LONGEST_WAIT), AskForWork())
        case AskForWork(), Assigned(work) if not isinstance(work, Wait):
            return _to(Do(work))
        case Do(Finished()), Worked():
            return _to(Stop())
        case Do(), Worked():
            return _to(Send())
        case Do(), WorkFailed():
            return _sleep(PAUSE_AFTER_FAILED_WORK, AskForWork())
        case Send(), Delivered():
            return _to(AskForWork())
        case Send(), Rejected(code):
            return _to(Drop(code))
        case AskForWork(), Rejected():
            return _sleep(PAUSE_AFTER_FAILED_WORK, AskForWork())
        case (AskForWork() | Send() | Do()) as doing, NoAnswer(retry_after):
            seconds = max(min(retry_after, LONGEST_WAIT), pause(session.failures, jitter))
            again: Action = AskForWork() if isinstance(doing, Do) else doing
            return replace(session, doing=Sleep(seconds), after_sleep=again, failures=session.failures + 1), Sleep(seconds)
        case Sleep(), Woke() if session.after_sleep is not None:
            return replace(session, doing=session.after_sleep, after_sleep=None), session.after_sleep
        case Drop(code), Woke():
            return _to(AskForWork()) if code in CAME_LATE else _sleep(PAUSE_AFTER_FAILED_WORK, AskForWork())
        case _:
            raise ValueError(f"{event} cannot follow {session.doing}")


def _to(action: Action) -> tuple[Session, Action]:
    return Session(action), action


def _sleep(seconds: float, then: Action) -> tuple[Session, Action]:
    return Session(Sleep(seconds), after_sleep=then), Sleep(seconds)
