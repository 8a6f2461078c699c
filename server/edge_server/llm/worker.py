"""The process where the LLM lives: one job a line on stdin, one outcome a line on stdout. Started by `compute.py`."""

from __future__ import annotations

import os
import resource
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from safetensors.numpy import load_file, save

from edge_sdk import files
from edge_sdk.errors import EdgeError
from edge_server.llm.jobs import Failed, Foresee, Hello, Job, Label, Outcome, Perplexity, Scores, Texts, Tune, Tuned, Write

if TYPE_CHECKING:
    from edge_server.llm.model import Llm


def main() -> None:
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    lines = iter(sys.stdin.buffer)
    hello = msgspec.json.decode(next(lines), type=Hello)
    if limit := hello.llm.memory_mb << 20:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    llm: Llm | None = None
    for line in lines:
        try:
            if llm is None:
                from edge_server.llm.model import Llm

                llm = Llm(Path(hello.path), hello.task, hello.llm)
            outcome = do(llm, msgspec.json.decode(line, type=Job))
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


def do(llm: Llm, job: Job) -> Outcome:
    """One job. Raises: DataError: it cannot be done."""
    began = time.perf_counter()
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


if __name__ == "__main__":
    main()
