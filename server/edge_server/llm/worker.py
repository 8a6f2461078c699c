"""The process where the LLM lives: one job a line on stdin, one outcome a line on stdout. Started by `compute.py`."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec
from safetensors.numpy import load_file, save

from edge_sdk import bundle as bundles
from edge_sdk import exchange, files, knowledge
from edge_sdk.engines import open_engine
from edge_sdk.errors import DataError, EdgeError, WireError
from edge_sdk.exchange import Voice
from edge_sdk.knowledge import Knowledge, Sheet
from edge_sdk.tokens import PromptEncoder
from edge_server.llm.jobs import (
    Describe,
    Described,
    Distil,
    Distilled,
    Failed,
    Foresee,
    Hello,
    Job,
    Label,
    Outcome,
    Perplexity,
    Scores,
    Studied,
    Study,
    Tell,
    Texts,
    Told,
    Tune,
    Tuned,
    Write,
)

if TYPE_CHECKING:
    from edge_sdk.training.learner import Learner
    from edge_server.llm.model import Llm


def main() -> None:
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    lines = iter(sys.stdin.buffer)
    hello = msgspec.json.decode(next(lines), type=Hello)
    if limit := hello.llm.memory_mb << 20:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    models: Models | None = None
    for line in lines:
        try:
            models = models or load(hello)
            outcome = do(models, msgspec.json.decode(line, type=Job))
        except EdgeError as error:
            outcome = Failed(str(error))
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and "memory" not in str(error):
                raise
            outcome = Failed("its process is out of memory; smaller batches, or more llm.memory_mb, may help")
        answers.write(msgspec.json.encode(outcome) + b"\n")
        answers.flush()


def _end_with(server: int) -> None:
    """Ends this process soon after its server, in the middle of a job too: a new server starts a worker of its own."""
    while os.getppid() == server:
        time.sleep(1.0)
    os._exit(1)


class Models(NamedTuple):
    """What a worker has: the LLM, and the devices' model where jobs are about it."""

    llm: Llm
    slm: Learner | None = None
    end: int | None = None  # the SLM's end token


def load(hello: Hello) -> Models:
    """Raises: DataError: a model cannot be read."""
    from edge_server.llm.model import Llm

    llm = Llm(Path(hello.path), hello.task, hello.llm)
    if hello.slm is None:
        return Models(llm)
    from edge_sdk.training.learner import Learner

    folder, task, threads = Path(hello.slm.folder), hello.task, hello.llm.threads
    bundle = bundles.read(folder)
    engine = open_engine(folder, bundle, task, threads=threads)
    learner = Learner.beside(engine, folder, bundle, hello.slm.adapter, task, threads)
    return Models(llm, learner, next(iter(bundle.end), None))


def do(models: Models, job: Job) -> Outcome:
    """One job. Raises: DataError: it cannot be done."""
    llm, began = models.llm, time.perf_counter()
    if isinstance(job, Distil):
        return _distil(models, job)
    if isinstance(job, Describe):
        return Described(llm.voice.encoder.tokenizer.to_str(), llm.voice.end)
    llm.set(load_file(job.adapter) if job.adapter else None)
    match job:
        case Write(prompts=prompts, counts=counts, sampling=sampling):
            texts = llm.write(prompts, counts, sampling)
            return Texts(tuple(map(tuple, texts)), time.perf_counter() - began)
        case Tune(out=out, lessons=lessons, tuning=tuning, seed=seed):
            if not job.adapter:
                llm.set(llm.start(seed))
            loss = llm.tune(lessons, tuning, seed)
            files.write(Path(out), save(llm.get()))
            return Tuned(loss, time.perf_counter() - began)
        case Label(texts=labelled):
            return Scores(tuple(tuple(map(float, row)) for row in llm.logits(labelled)))
        case Foresee(texts=foreseen):
            return Perplexity(llm.perplexity(foreseen))
        case Tell() | Study():
            return _over_answers(llm, job)


def _over_answers(llm: Llm, job: Tell | Study) -> Told | Studied:
    from edge_server.llm import study

    began = time.perf_counter()
    if isinstance(job, Tell):
        known, right = study.tell(llm, job.public, job.k)
        files.write(Path(job.out), knowledge.pack(known, exchange.sheet(llm.voice, job.public)))
        return Told(right)
    if not job.adapter:
        llm.set(llm.start(job.seed))
    voices: dict[tuple[str, int | None], tuple[Voice, Sheet]] = {}
    heard = []
    for answers in job.heard:
        if (key := (answers.tokenizer, answers.end)) not in voices:
            voice = Voice(PromptEncoder(Path(answers.tokenizer), (), (), exchange.POSITIONS, answers.task), answers.end)
            voices[key] = voice, exchange.sheet(voice, job.public)
        voice, sheet = voices[key]
        with contextlib.suppress(WireError):  # of a model that the device had before, or of other answers
            heard.append((voice, _known(Path(answers.body).read_bytes(), sheet, job.k)))
    loss, taught = study.study(llm, job.public, heard, job.k, job.label_weight, job.tuning, job.seed)
    files.write(Path(job.out), save(llm.get()))
    return Studied(loss, len(heard), taught, time.perf_counter() - began)


def _known(body: bytes, sheet: Sheet, k: int) -> list[Knowledge]:
    return knowledge.unpack_judgment(body, lambda _: sheet, knowledge.plain_limit(sheet, k), k)[1]


def _distil(models: Models, job: Distil) -> Distilled:
    from edge_server.llm import distil

    llm, slm, began = models.llm, models.slm, time.perf_counter()
    if slm is None:
        raise DataError("this worker has no model of the devices")
    llm.set(load_file(job.llm) if job.llm else llm.start(job.seed))
    slm.set(load_file(job.slm))
    pair = distil.partners(slm, llm, job.examples, models.end)
    slm_loss, llm_loss = distil.distil(*pair, job.how, job.seed)
    files.write(Path(job.slm_out), save(slm.get()))
    files.write(Path(job.llm_out), save(llm.get()))
    return Distilled(slm_loss, llm_loss, time.perf_counter() - began)


if __name__ == "__main__":
    main()
