"""Where LLM work runs: one local process, which may crash, hang or run out of memory while the server goes on."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec

from edge_sdk.assets import MODELS, Asset, resolve
from edge_sdk.errors import DataError, EdgeError
from edge_sdk.tasks import Task
from edge_server.llm.jobs import Failed, Hello, Job, LlmSettings, Outcome, Slm

T = TypeVar("T")

MAX_LINE = 1 << 26
log = logging.getLogger(__name__)


class JobFailed(EdgeError):
    """A job could not be done; the message says why, and what was tried."""


class Compute(Protocol):
    """Does jobs, one at a time or many."""

    async def run(self, job: Job) -> Outcome:
        """Raises: JobFailed: it cannot be done."""
        ...

    async def close(self) -> None: ...


class LocalCompute:
    """One worker process, started with the first job and again after a crash.

    Args:
        settings: model, limits, tries. task: how the LLM is asked for classes. slm: the devices' model, where jobs are about it.
    """

    def __init__(self, settings: LlmSettings, task: Task, slm: Slm | None = None) -> None:
        self._settings, self._task, self._slm = settings, task, slm
        self._lock = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None

    async def run(self, job: Job) -> Outcome:
        """One job after the other; what crashes or takes too long is tried again.

        Raises:
            JobFailed: refused by the worker, or crashed as often as the settings allow.
        """
        async with self._lock:
            trouble = ""
            for attempt in range(1, self._settings.tries + 1):
                try:
                    async with asyncio.timeout(self._settings.timeout_seconds):
                        outcome = await self._ask(msgspec.json.encode(job))
                except TimeoutError:
                    trouble = f"took more than {self._settings.timeout_seconds:g} seconds (llm.timeout_seconds)"
                except (ConnectionError, asyncio.IncompleteReadError):
                    trouble = await self._obituary()
                except (asyncio.LimitOverrunError, msgspec.DecodeError, ValueError) as error:
                    trouble = f"its answer cannot be read ({error})"
                except BaseException:  # cancelled in the middle of an answer: the process cannot be used again
                    await self._end()
                    raise
                else:
                    if isinstance(outcome, Failed):
                        raise JobFailed(f"the LLM cannot {_verb(job)}: {outcome.reason}")
                    return outcome
                log.warning("LLM job %s: %s; attempt %d of %d", _verb(job), trouble, attempt, self._settings.tries)
                await self._end()
            raise JobFailed(f"the LLM cannot {_verb(job)}: {trouble}, {self._settings.tries} times")

    async def close(self) -> None:
        await self._end()

    @property
    def pid(self) -> int | None:
        """Of the worker, where it runs."""
        return self._process.pid if self._process else None

    async def _ask(self, line: bytes) -> Outcome:
        process = self._process or await self._start()
        send, answers = _pipes(process)
        send.write(line + b"\n")
        await send.drain()
        outcome: Outcome = msgspec.json.decode(await answers.readuntil(b"\n"), type=Outcome)
        return outcome

    async def _start(self) -> asyncio.subprocess.Process:
        settings = self._settings
        asset = MODELS.get(settings.model) or Asset(settings.model)
        path = await asyncio.to_thread(resolve, asset)
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "edge_server.llm.worker", stdin=pipe, stdout=pipe, limit=MAX_LINE
        )
        _pipes(self._process)[0].write(msgspec.json.encode(Hello(str(Path(path)), self._task, settings, self._slm)) + b"\n")
        return self._process

    async def _obituary(self) -> str:
        code = await self._process.wait() if self._process else None
        return f"its process ended with exit code {code}" + (" (killed: out of memory?)" if code == -signal.SIGKILL else "")

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


def expect(outcome: Outcome, kind: type[T]) -> T:
    """Raises: DataError: the process answered another question."""
    if not isinstance(outcome, kind):
        raise DataError(f"the LLM's process answered {type(outcome).__name__}")
    return outcome


def _pipes(process: asyncio.subprocess.Process) -> tuple[asyncio.StreamWriter, asyncio.StreamReader]:
    if process.stdin is None or process.stdout is None:
        raise ValueError("the process was started without pipes")
    return process.stdin, process.stdout


def _verb(job: Job) -> str:
    return type(job).__name__.lower()
