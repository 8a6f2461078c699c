"""Writing through an OpenAI-compatible server: a real one of llama-cpp-python, and ones that misbehave."""

from __future__ import annotations

import asyncio
import importlib.util
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import pytest_asyncio
from aiohttp import web
from aiohttp.test_utils import TestServer

from edge_sdk.assets import MODELS, resolve
from edge_sdk.engines import Sampling
from edge_server.compute import JobFailed
from edge_server.endpoint import MAX_ANSWER, Endpoint
from edge_server.llm.jobs import Label, LlmSettings, Texts, Write

WRITE = Write("", ("the film was", "a day"), (3, 2), Sampling(6, 1.0, 0.9, 1))
SERVER = all(importlib.util.find_spec(name) for name in ("llama_cpp", "uvicorn", "sse_starlette", "starlette_context"))

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


def endpoint(url: object, timeout: float = 5.0, tries: int = 2) -> Endpoint:
    return Endpoint(
        LlmSettings(endpoint=f"{str(url).rstrip('/')}/v1", endpoint_model="tiny", timeout_seconds=timeout, tries=tries)
    )


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
