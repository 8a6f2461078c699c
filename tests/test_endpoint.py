"""Writing through an OpenAI-compatible server: a real one of llama-cpp-python, and ones that misbehave."""

from __future__ import annotations

import asyncio
import importlib.util
import math
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import msgspec
import pytest
import pytest_asyncio
from aiohttp import web
from aiohttp.test_utils import TestServer

from edge_sdk.assets import MODELS, resolve
from edge_sdk.engines import Sampling
from edge_sdk.errors import SettingsError
from edge_server.compute import JobFailed
from edge_server.endpoint import MAX_ANSWER, Endpoint, writer
from edge_server.llm.jobs import Label, LlmSettings, Texts, Write
from edge_server.systems.crosslm import CrossLm

WRITE = Write("", ("the film was", "a day"), (3, 2), Sampling(6, 1.0, 0.9, 1))
SERVER = all(importlib.util.find_spec(name) for name in ("llama_cpp", "uvicorn", "sse_starlette", "starlette_context"))

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


def settings(url: object, timeout: float = 5.0, key: str = "") -> LlmSettings:
    where = f"{str(url).rstrip('/')}/v1"
    return LlmSettings(endpoint=where, endpoint_model="tiny", endpoint_seconds=timeout, endpoint_key=key, tries=2)


def endpoint(url: object, timeout: float = 5.0) -> Endpoint:
    return Endpoint(settings(url, timeout))


@pytest_asyncio.fixture
async def serve() -> AsyncIterator[Callable[[Answer], Awaitable[object]]]:
    """Starts a server that answers completions in some way; gives its address."""
    servers: list[TestServer] = []

    async def start(answer: Answer) -> object:
        app = web.Application()
        app.router.add_post("/v1/completions", answer)
        servers.append(TestServer(app, host="127.0.0.1"))
        await servers[-1].start_server()
        return servers[-1].make_url("/")

    yield start
    for server in servers:
        await server.close()


async def test_what_is_asked_and_what_is_made_of_it(serve: Callable[[Answer], Awaitable[object]]) -> None:
    """One request a text, each with a seed of its own, OpenAI's names, and the texts in their places."""
    asked = []

    async def answer(request: web.Request) -> web.Response:
        asked.append(await request.json())
        return web.json_response({"id": 1, "choices": [{"text": f" {asked[-1]['prompt']} fine ", "index": 0}]})

    written = await endpoint(await serve(answer)).run(WRITE)

    assert isinstance(written, Texts)
    assert written.texts == (("the film was fine",) * 3, ("a day fine",) * 2)
    assert len({request["seed"] for request in asked}) == 5
    assert asked[0].keys() == {"model", "prompt", "max_tokens", "temperature", "top_p", "seed", "stop"}
    assert (asked[0]["model"], asked[0]["max_tokens"], asked[0]["stop"]) == ("tiny", 6, ['"', "\n"])


@pytest.mark.parametrize(
    ("said", "finish", "text"),
    [
        ('A fine film." she said. "And', "length", "A fine film."),
        ("A fine film.\nNext one", "length", "A fine film."),
        ("A fine film. The other was", "length", "A fine film."),
        ("A fine film. I loved it", "stop", "A fine film. I loved it"),
        (" no end ", None, "no end"),
    ],
)
async def test_a_text_ends_where_its_quotation_does(
    serve: Callable[[Answer], Awaitable[object]], said: str, finish: str | None, text: str
) -> None:
    """Whether the server heeds `stop` or not; what it cut short keeps its whole sentences."""

    async def answer(_: web.Request) -> web.Response:
        return web.json_response({"choices": [{"text": said, "finish_reason": finish}]})

    written = await endpoint(await serve(answer)).run(WRITE)

    assert isinstance(written, Texts)
    assert written.texts == ((text,) * 3, (text,) * 2)


async def test_the_key_is_sent_and_told_to_nobody(serve: Callable[[Answer], Awaitable[object]]) -> None:
    """It comes from the environment and goes to the endpoint, not to where that sends us, nor into what is said or kept."""
    keys = []

    async def answer(request: web.Request) -> web.Response:
        keys.append(request.headers.get("Authorization"))
        raise web.HTTPTemporaryRedirect("/v1/completions")

    made = writer(settings(await serve(answer), key="SOME_KEY"), {"SOME_KEY": " secret\n"})
    assert made is not None
    with pytest.raises(JobFailed, match="answered 307, 2 times") as failed:
        await made.run(Write("", ("a",), (1,), Sampling(6)))

    assert keys == ["Bearer secret"] * 2
    assert "secret" not in f"{failed.value} {made!r} {msgspec.json.encode(made.settings)!r}"


@pytest.mark.parametrize("environment", [{}, {"SOME_KEY": " "}, {"SOME_KEY": "a\nb"}, {"SOME_KEY": "\u00e4"}])
def test_a_key_that_is_not_there_is_asked_for(environment: dict[str, str]) -> None:
    """By the variable's name, when the server starts; a run without an endpoint needs none."""
    with pytest.raises(SettingsError, match=r"SOME_KEY .* set it"):
        writer(settings("http://127.0.0.1:9", key="SOME_KEY"), environment)
    assert writer(LlmSettings(endpoint_key="SOME_KEY"), environment) is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"endpoint": "127.0.0.1:8000/v1"},
        {"endpoint": "ftp://127.0.0.1/v1"},
        {"endpoint": "http:///v1"},
        {"endpoint": "http://127.0.0.1:99999/v1"},
        {"endpoint": "http://me:word@127.0.0.1/v1"},
        {"endpoint_seconds": 0.0},
        {"endpoint_seconds": math.inf},
        {"endpoint_key": "sk-not-a-name"},
    ],
)
def test_an_endpoint_out_of_bounds(wrong: dict[str, Any]) -> None:
    """Said when the file is read, without what may be a password or a key."""
    with pytest.raises(SettingsError, match=f"llm.{next(iter(wrong))} must be ") as refused:
        LlmSettings(**wrong)
    assert not any(secret in str(refused.value) for secret in ("me:word", "sk-not"))


def test_a_run_says_which_model_writes() -> None:
    """Every sample of the feed names it."""
    with pytest.raises(SettingsError, match=r"crosslm\.llm\.endpoint_model"):
        CrossLm(("a {label} day",), llm=LlmSettings(endpoint="http://127.0.0.1:9/v1"))


async def _refuse(_: web.Request) -> web.Response:
    return web.Response(status=500, text="no")


async def _nonsense(_: web.Request) -> web.Response:
    return web.Response(text="<html>hello</html>")


async def _nothing(_: web.Request) -> web.Response:
    return web.json_response({"choices": []})


async def _flood(_: web.Request) -> web.Response:
    return web.json_response({"choices": [{"text": "a" * (MAX_ANSWER + 1)}]})


async def _hang(_: web.Request) -> web.Response:
    await asyncio.Event().wait()
    return web.Response()


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (_refuse, "answered 500, 2 times"),
        (_nonsense, "did not answer as OpenAI's completions do"),
        (_nothing, "did not answer as OpenAI's completions do"),
        (_flood, "answered more than 1048576 bytes"),
        (_hang, r"did not answer within 0\.2 seconds"),
    ],
)
async def test_an_endpoint_that_misbehaves(serve: Callable[[Answer], Awaitable[object]], answer: Answer, reason: str) -> None:
    """Errors, nonsense, floods and silence are one line that names the endpoint; nothing waits for ever."""
    with pytest.raises(JobFailed, match=f"the endpoint http.*{reason}"):
        await endpoint(await serve(answer), 0.2 if answer is _hang else 5.0).run(WRITE)


async def test_it_does_nothing_but_write() -> None:
    """Other jobs are refused before anything is sent."""
    with pytest.raises(JobFailed, match="writes texts and nothing else"):
        await endpoint("http://127.0.0.1:9").run(Label("", ("a",)))


@pytest.fixture(scope="module")
def llama_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """llama-cpp-python's own server with the real SmolLM2."""
    if not SERVER:
        pytest.skip("llama-cpp-python's server is not installed: make setup GGUF=1")
    path, port = tmp_path_factory.mktemp("llama") / "log", _free_port()
    arguments = ("--model", str(resolve(MODELS["smollm2"])), "--host", "127.0.0.1", "--port", str(port), "--n_ctx", "256")
    with path.open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "llama_cpp.server", *arguments], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while not _answers(f"http://127.0.0.1:{port}/v1/models"):
            assert process.poll() is None, path.read_text()
            assert time.monotonic() < deadline, "waited too long"
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
async def test_a_real_llama_server_writes(llama_server: str) -> None:
    """Different texts for different seeds, none beyond its length or its closing quote."""
    job = Write("", ('A short review of a lovely film: "',), (3,), Sampling(12, 1.0, 0.9, 5))
    written = await endpoint(llama_server, 60.0).run(job)

    assert isinstance(written, Texts)
    assert [len(texts) for texts in written.texts] == [3]
    assert len(set(written.texts[0])) > 1
    assert all('"' not in text and "\n" not in text and len(text.split()) <= 12 for text in written.texts[0])


def _free_port() -> int:
    with socket.socket() as some:
        some.bind(("127.0.0.1", 0))
        return int(some.getsockname()[1])


def _answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=5) as answer:  # noqa: S310  # our own server
            return bool(answer.status == 200)
    except (URLError, OSError):
        return False
