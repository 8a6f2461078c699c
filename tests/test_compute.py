"""The process where the LLM lives: it does its jobs, and whatever happens to it, the server hears of it and goes on."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio
from safetensors.numpy import load_file

from edge_sdk.engines import Sampling
from edge_sdk.errors import AssetError
from edge_server.compute import JobFailed, LocalCompute
from edge_server.llm.jobs import (
    Foresee,
    Label,
    Labelled,
    Lessons,
    LlmSettings,
    Perplexity,
    Scores,
    Texts,
    Tune,
    Tuned,
    Tuning,
    Write,
)
from tests import factories, tiny
from tests.test_end_to_end import ROOT, until

TEXTS = ("the film was great", "so dull")
WRITE = Write("", ("the film was", "a day"), (3, 2), Sampling(5, 1.0, 0.9, 1))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("llm"), "llama")


@pytest.fixture
def settings(model: Path) -> LlmSettings:
    return LlmSettings(model=str(model), layers=2, rank=4, threads=1, timeout_seconds=120)


@pytest_asyncio.fixture
async def compute(settings: LlmSettings) -> AsyncIterator[LocalCompute]:
    made = LocalCompute(settings, factories.DECODER_TASK)
    yield made
    await made.close()


async def test_every_kind_of_job(compute: LocalCompute, tmp_path: Path) -> None:
    """Texts, an adapter file, scores that the adapter changes, a perplexity; one process does them all, each the same twice."""
    out = tmp_path / "adapter.safetensors"
    lessons = Lessons(labelled=(Labelled(TEXTS[0], (0.0, 1.0)),))
    tune = Tune("", str(out), lessons, Tuning(steps=5, batch_size=1, learning_rate=1e-2), 1)
    written = await compute.run(WRITE)
    process = compute.pid
    tuned = await compute.run(tune)
    plain, changed = await compute.run(Label("", TEXTS)), await compute.run(Label(str(out), TEXTS))
    foreseen = await compute.run(Foresee("", TEXTS))

    assert isinstance(written, Texts)
    assert [len(texts) for texts in written.texts] == [3, 2]
    again = await compute.run(WRITE)
    assert isinstance(again, Texts)
    assert again.texts == written.texts
    assert isinstance(tuned, Tuned)
    assert tuned.loss > 0
    assert all(name.startswith("base_model.model.model.layers.") and ".lora_" in name for name in load_file(out))
    assert isinstance(plain, Scores)
    assert isinstance(changed, Scores)
    assert changed.scores[0][1] - changed.scores[0][0] > plain.scores[0][1] - plain.scores[0][0]
    assert isinstance(foreseen, Perplexity)
    assert foreseen.value > 1
    assert compute.pid == process


async def test_a_worker_that_is_killed_is_started_again(compute: LocalCompute) -> None:
    """kill -9 in the middle of a job: the job is done all the same, by another process, with the same result."""
    first = await compute.run(WRITE)
    killed = compute.pid
    assert killed is not None
    job = asyncio.create_task(compute.run(msgspec.structs.replace(WRITE, counts=(40, 40))))
    await asyncio.sleep(0)  # the job is on its way
    os.kill(killed, signal.SIGKILL)
    many = await job

    assert isinstance(many, Texts)
    assert [len(texts) for texts in many.texts] == [40, 40]
    assert compute.pid != killed
    again = await compute.run(WRITE)
    assert isinstance(first, Texts)
    assert isinstance(again, Texts)
    assert again.texts == first.texts


async def test_a_job_that_hangs_is_given_up_and_the_next_one_runs(settings: LlmSettings) -> None:
    """A timeout is an error that names its setting; the worker is replaced."""
    compute = LocalCompute(msgspec.structs.replace(settings, timeout_seconds=0.05, tries=2), factories.DECODER_TASK)
    with pytest.raises(JobFailed, match=r"cannot write: took more than 0\.05 seconds \(llm\.timeout_seconds\), 2 times"):
        await compute.run(WRITE)
    assert compute.pid is None
    await compute.close()


async def test_a_job_that_cannot_be_done_is_said_once(compute: LocalCompute) -> None:
    """What would fail again is not tried again, and the worker lives."""
    await compute.run(Label("", TEXTS))
    process = compute.pid
    with pytest.raises(JobFailed, match="cannot foresee: perplexity needs a text of at least two tokens"):
        await compute.run(Foresee("", ("film",)))

    assert compute.pid == process
    assert isinstance(await compute.run(Label("", TEXTS)), Scores)


async def test_a_worker_out_of_memory_is_reported(settings: LlmSettings) -> None:
    """With less memory than torch needs the job fails with what to do, and nothing else does."""
    compute = LocalCompute(msgspec.structs.replace(settings, memory_mb=40, tries=1), factories.DECODER_TASK)
    with pytest.raises(JobFailed, match=r"cannot label: its process (ended with exit code|is out of memory)"):
        await compute.run(Label("", TEXTS))
    await compute.close()


async def test_a_model_that_is_not_there(settings: LlmSettings) -> None:
    """A wrong name is told at the first job."""
    compute = LocalCompute(msgspec.structs.replace(settings, model="no/such/model"), factories.DECODER_TASK)
    with pytest.raises(AssetError, match="no/such/model"):
        await compute.run(WRITE)


async def test_a_cancelled_job_leaves_no_answer_behind(compute: LocalCompute) -> None:
    """The next job gets its own answer, not the cancelled one's."""
    await compute.run(Label("", TEXTS))
    job = asyncio.create_task(compute.run(WRITE))
    await asyncio.sleep(0)
    job.cancel()
    with pytest.raises(asyncio.CancelledError):
        await job

    assert isinstance(await compute.run(Label("", TEXTS)), Scores)


SERVER = """
import asyncio, sys
from edge_sdk.engines import Sampling
from edge_server.compute import LocalCompute
from edge_server.llm.jobs import LlmSettings, Write
from tests import factories

async def main() -> None:
    compute = LocalCompute(LlmSettings(model=sys.argv[1], layers=2, rank=4, threads=1), factories.DECODER_TASK)
    endless = Write("", ("the film was",), (10**6,), Sampling(100, 1.0, 0.9, 1))
    job = asyncio.create_task(compute.run(endless))
    while not compute.pid:
        await asyncio.sleep(0.01)
    print(compute.pid, flush=True)
    await job

asyncio.run(main())
"""


def test_a_worker_does_not_outlive_its_server(model: Path) -> None:
    """kill -9 of the server in the middle of a job that would take hours: the worker is gone soon after."""
    server = subprocess.Popen([sys.executable, "-c", SERVER, str(model)], stdout=subprocess.PIPE, cwd=ROOT)
    assert server.stdout is not None
    worker = int(server.stdout.readline())
    until(lambda: b"libtorch" in Path(f"/proc/{worker}/maps").read_bytes())  # it is at work, or about to be
    server.kill()
    server.wait()
    server.stdout.close()

    until(lambda: not alive(worker), 20)


def alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
