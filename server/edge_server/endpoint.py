"""An OpenAI-compatible server (vLLM, llama-server, llama-cpp-python) that does the writing; it cannot learn."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import aiohttp
import msgspec

from edge_sdk.engines import Sampling
from edge_sdk.errors import SettingsError
from edge_server.compute import JobFailed
from edge_server.llm.jobs import Job, LlmSettings, Outcome, Texts, Write
from edge_server.llm.quotation import CLOSING, inside

MAX_ANSWER = 1 << 20
STOPS = [CLOSING, "\n"]  # some servers do not heed them


class Choice(msgspec.Struct, frozen=True):
    """`finish_reason` is `stop` where the text was ended, not cut; the stop itself is left out of it."""

    text: str
    finish_reason: str | None = None


class Completion(msgspec.Struct, frozen=True):
    """What of an answer is read; the rest is the endpoint's business."""

    choices: tuple[Choice, ...]


@dataclass(frozen=True)
class Endpoint:
    """Does `Write` jobs by `POST {endpoint}/completions`, one text a request, some at a time.

    Args:
        settings: `endpoint`, `endpoint_model`, `endpoint_seconds`, `tries`.
        key: its API key, "" for none.
        at_once: requests under way.
    """

    settings: LlmSettings
    key: str = field(default="", repr=False)
    at_once: int = 4

    async def run(self, job: Job) -> Outcome:
        """Raises: JobFailed: it is no writing, or the endpoint does not answer as it should."""
        if not isinstance(job, Write):
            raise JobFailed("an endpoint writes texts and nothing else")
        began, room = time.perf_counter(), asyncio.Semaphore(self.at_once)
        limit = aiohttp.ClientTimeout(total=self.settings.endpoint_seconds)
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        async with aiohttp.ClientSession(timeout=limit, headers=headers) as session:

            async def one(prompt: str, seed: int) -> str:
                async with room:
                    return await self._text(session, prompt, job.sampling, seed)

            try:
                async with asyncio.TaskGroup() as group:
                    texts = [
                        [group.create_task(one(prompt, job.sampling.seed + 1000 * i + at)) for at in range(count)]
                        for i, (prompt, count) in enumerate(zip(job.prompts, job.counts, strict=True))
                    ]
            except* JobFailed as failed:
                raise failed.exceptions[0] from None  # the others failed alike, or were given up
        return Texts(tuple(tuple(task.result() for task in some) for some in texts), time.perf_counter() - began)

    async def close(self) -> None:
        """Nothing is held."""

    async def _text(self, session: aiohttp.ClientSession, prompt: str, sampling: Sampling, seed: int) -> str:
        asked = {
            "model": self.settings.endpoint_model,
            "prompt": prompt,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": seed,
            "stop": STOPS,
        }
        trouble = ""
        for _ in range(self.settings.tries):
            try:
                url = f"{self.settings.endpoint.rstrip('/')}/completions"
                async with session.post(url, json=asked, allow_redirects=False) as answer:  # the key goes nowhere else
                    body = await answer.content.read(MAX_ANSWER + 1)
                    while len(body) <= MAX_ANSWER and (more := await answer.content.read(MAX_ANSWER)):
                        body += more
                if answer.status != 200:
                    trouble = f"answered {answer.status}"
                elif len(body) > MAX_ANSWER:
                    trouble = f"answered more than {MAX_ANSWER} bytes"
                else:
                    found = msgspec.json.decode(body, type=Completion).choices[0]
                    return inside(found.text + CLOSING if found.finish_reason == "stop" else found.text)
            except TimeoutError:
                trouble = f"did not answer within {self.settings.endpoint_seconds:g} seconds"
            except (aiohttp.ClientError, OSError) as error:
                trouble = f"cannot be reached ({' '.join(str(error).split())})"
            except (msgspec.DecodeError, UnicodeDecodeError, IndexError):
                trouble = "did not answer as OpenAI's completions do"
        raise JobFailed(f"the endpoint {self.settings.endpoint} {trouble}, {self.settings.tries} times")


def writer(settings: LlmSettings, environment: Mapping[str, str] = os.environ) -> Endpoint | None:
    """The endpoint of these settings, if they have one.

    Raises:
        SettingsError: the environment variable that shall hold its key does not.
    """
    if not settings.endpoint:
        return None
    key = environment.get(settings.endpoint_key, "").strip() if settings.endpoint_key else ""
    if settings.endpoint_key and not (key.isascii() and key.isprintable() and key):
        raise SettingsError(f"the environment variable {settings.endpoint_key} (llm.endpoint_key) holds no API key; set it")
    return Endpoint(settings, key)
