"""Which system a run is: its rules and its LLM's side, bound to the questions that the ledger asks of every run alike.

A new system is a file in `systems/`, perhaps a shell for its LLM, a function here, and a case in `of`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from edge_sdk import wire
from edge_sdk.adapters import AdapterSpec, Array
from edge_sdk.errors import SettingsError
from edge_sdk.protocol import Judgment, Line, Manifest, Work
from edge_sdk.tasks import Example, Task
from edge_server.author import Author
from edge_server.compute import Compute, LocalCompute
from edge_server.coordinator import Buffered, Device, Event, State
from edge_server.distiller import Distiller
from edge_server.endpoint import writer
from edge_server.knowledge.filters import Embed
from edge_server.settings import RunSettings
from edge_server.storage import Blobs
from edge_server.systems import crosslm, fedcollm, fedmkt, lpfl
from edge_server.systems.crosslm import CrossLm
from edge_server.systems.fedcollm import FedCoLlm
from edge_server.systems.fedmkt import FedMkt
from edge_server.systems.lpfl import LpFl
from edge_server.tutor import Tutor, sheet

Texts = tuple[Example, ...]
Models = Mapping[str, Manifest]
Now = Callable[[], float]


class Llm(Protocol):
    """The side of an LLM that learns from what devices say of sheets; devices keep what they learn."""

    async def step(self, state: State) -> tuple[Sequence[Event], str]:
        """Does what is next: what happened, and what to say of it; no events where there is nothing to do.

        Raises:
            JobFailed, DataError, OSError: it cannot be done now.
        """
        ...

    def read(self, body: bytes, state: State) -> Judgment:
        """A judgment, checked to its last byte. Raises: WireError: it is refused."""
        ...


@dataclass(frozen=True)
class Feed:
    """Synthetic data for devices.

    Args:
        task: what the feed calls it. lines: the feed, from what of it is there already. open: ids of what is being judged.
    """

    task: str
    lines: Callable[[State, list[Line]], list[Line]]
    open: Callable[[State], Collection[str]]


def _fine() -> None:
    """Nothing is wrong."""


def _tuned(state: State) -> Collection[str]:
    return state.tuned


async def _as_averaged(averaged: dict[str, Array], _: State) -> tuple[dict[str, Array], str, str]:
    return averaged, "", ""


@dataclass(frozen=True)
class Run:
    """What there is to ask of a system, whichever it is.

    Args:
        start: version 0. plan: what a device that asks should do now. finished: whether all is done.
        averaged: the updates that the next version is made from, at a time in seconds since the epoch.
        wait_seconds: the shortest wait that devices are told.
        refine: what becomes of their average: the version's adapter, the blob of the LLM's or "", and what to say of it.
        check: raises SettingsError where what the blobs hold cannot be worked with; they are all there then.
        compute: where the LLM runs. llm: its side, where it learns from devices' judgments. feed: of what it has written.
        deadline_seconds: after a sheet was written, with at least one judgment.
        notes: blobs that are the server's own, and no device's business.
        shares_from: the first version from which devices send what they learn. judgment_limit: bytes that a judgment may have.
    """

    start: Callable[[AdapterSpec], dict[str, Array]]
    plan: Callable[[State, Device, bool], Work]
    averaged: Callable[[State, float], tuple[Buffered, ...]]
    finished: Callable[[State], bool]
    wait_seconds: float
    refine: Callable[[dict[str, Array], State], Awaitable[tuple[dict[str, Array], str, str]]] = _as_averaged
    check: Callable[[], None] = _fine
    compute: Compute | None = None
    llm: Llm | None = None
    feed: Feed | None = None
    deadline_seconds: float = 0.0
    notes: Callable[[State], Collection[str]] = _tuned
    shares_from: int = 0
    judgment_limit: int = wire.MAX_JSON


def of(
    settings: RunSettings, compute: Compute | None, auxiliary: Texts, models: Models, embed: Embed | None, now: Now
) -> Callable[[Blobs], Run]:
    """The run of these settings, once there is a place for its blobs.

    Args:
        compute, auxiliary, embed, now: as in `Ledger`. models: what devices are told, by the model's name, "" for
            the first.

    Raises:
        SettingsError: the system needs something that is not there.
    """
    match settings:
        case RunSettings(system="crosslm", crosslm=CrossLm() as own):
            return partial(_crosslm, own, settings.task, compute or LocalCompute(own.llm, settings.task), embed, now)
        case RunSettings(system="fedcollm", fedcollm=FedCoLlm() as own):
            if compute is None or not auxiliary:
                raise SettingsError("fedcollm needs a process for its models, and labelled texts in the file fedcollm.auxiliary")
            return partial(_fedcollm, own, auxiliary, compute)
        case RunSettings(system="fedmkt", fedmkt=FedMkt() as own):
            if compute is None or not auxiliary:
                raise SettingsError("fedmkt needs a process for its LLM, and labelled texts in the file fedmkt.public")
            sheet(auxiliary)
            return partial(_fedmkt, own, settings.task, auxiliary, compute, models, now)
        case _:
            return partial(_lpfl, settings.lpfl)


def _lpfl(own: LpFl, _: Blobs) -> Run:
    start, plan, averaged = partial(lpfl.start, own), partial(lpfl.plan, own), partial(lpfl.averaged, own)
    return Run(start, plan, averaged, partial(lpfl.finished, own), own.wait_seconds)


def _crosslm(own: CrossLm, task: Task, compute: Compute, embed: Embed | None, now: Now, blobs: Blobs) -> Run:
    start, plan, averaged = partial(crosslm.start, own), partial(crosslm.plan, own), partial(crosslm.averaged, own)
    finished = partial(crosslm.finished, own)
    author = Author(own, task, blobs, compute, embed, now, writer(own.llm))
    feed, deadline, first = Feed(own.task, author.lines, author.open), own.deadline_seconds, own.versions
    shortest = min(each.wait_seconds for each in (own, own.federated) if each is not None)
    return Run(
        *(start, plan, averaged, finished, shortest),
        compute=compute,
        llm=author,
        feed=feed,
        deadline_seconds=deadline,
        notes=author.notes,
        shares_from=first,
    )


def _fedcollm(own: FedCoLlm, auxiliary: Texts, compute: Compute, blobs: Blobs) -> Run:
    start, plan, averaged = partial(fedcollm.start, own), partial(fedcollm.plan, own), partial(fedcollm.averaged, own)
    refine = Distiller(own, auxiliary, blobs, compute).refine
    wait = own.averaging.wait_seconds
    return Run(start, plan, averaged, partial(fedcollm.finished, own), wait, refine=refine, compute=compute)


def _fedmkt(own: FedMkt, task: Task, public: Texts, compute: Compute, models: Models, now: Now, blobs: Blobs) -> Run:
    starts = {name: blobs.put(wire.pack_adapter(fedmkt.start(own, told.adapter))) for name, told in models.items() if name}

    def plan(state: State, device: Device, can_train: bool) -> Work:
        return fedmkt.plan(own, state, device, can_train, starts.get(device.model, state.adapter))

    start, averaged, finished = partial(fedmkt.start, own), partial(fedmkt.averaged, own), partial(fedmkt.finished, own)
    tutor, patience = Tutor(own, task, public, blobs, compute, now, models), own.deadline_seconds
    limit = wire.MAX_SHEET if task.answer_tokens else wire.MAX_JSON
    common = start, plan, averaged, finished, own.wait_seconds
    return Run(*common, check=tutor.check, compute=compute, llm=tutor, deadline_seconds=patience, judgment_limit=limit)
