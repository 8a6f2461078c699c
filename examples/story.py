"""What a run with an LLM left behind, read from the server's folder: the LLM's adapters, what it wrote, what became of it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from bench import mutual
from edge_sdk.tasks import Example
from edge_server import coordinator
from edge_server.compute import LocalCompute
from edge_server.coordinator import Event, State
from edge_server.settings import RunSettings
from edge_server.storage import Blobs, EventLog, sqlite
from edge_server.systems.crosslm import Judged

SHOWN = 4  # texts of a sheet


@dataclass(frozen=True)
class Story:
    """Args:
    llm: accuracy on the task `before` and `after`; and with the threshold that calls half of all texts positive, `..._balanced`.
    synthetic: `written` texts, share of them `accepted_first` and `accepted_last`.
    early, late: some texts of the first and of the last sheet, as they were judged.
    """

    llm: dict[str, float]
    synthetic: dict[str, float]
    early: tuple[Judged, ...]
    late: tuple[Judged, ...]


def read(data: Path, settings: RunSettings, examples: Sequence[Example]) -> Story:
    """Reads a finished run, and asks its LLM about texts that nobody learned from.

    Raises:
        JobFailed, DataError: the LLM cannot be asked, or the folder is no such run.
    """
    state, log, blobs = State(), EventLog(sqlite(data / "events.sqlite")), Blobs(data / "blobs")
    for body in log.read():
        state = coordinator.apply(state, msgspec.json.decode(body, type=Event))
    log.close()
    sheets = [msgspec.json.decode(blobs.get(sheet.judged), type=list[Judged]) for sheet in state.sheets]
    return Story(
        asyncio.run(_skill(settings, blobs, state.tuned[-1], examples)),
        {
            "written": sum(sheet.count for sheet in state.sheets),
            "accepted_first": state.sheets[0].acceptance,
            "accepted_last": state.sheets[-1].acceptance,
        },
        tuple(some(sheets[0])),
        tuple(some(sheets[-1])),
    )


async def _skill(settings: RunSettings, blobs: Blobs, adapter: str, examples: Sequence[Example]) -> dict[str, float]:
    if settings.crosslm is None:
        return {}
    compute, found = LocalCompute(settings.crosslm.llm, settings.task), dict[str, float]()
    try:
        for name, path in (("before", ""), ("after", str(blobs.path(adapter) or ""))):
            found[name], found[f"{name}_balanced"] = await mutual.skill(compute, path, examples)
    finally:
        await compute.close()
    return found


def some(judged: Sequence[Judged]) -> list[Judged]:
    """A few texts, evenly spread over a sheet, so over prompts and labels."""
    count = min(SHOWN, len(judged))
    return [judged[i * len(judged) // count] for i in range(count)]
