"""HTTP handlers: bytes in, one call to the ledger, bytes out. Errors become RFC 9457 problem documents."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from aiohttp import web

from edge_sdk.cohort import Advertise, Reveal, Shares
from edge_sdk.errors import WireError
from edge_sdk.protocol import PROTOCOL, Ask, Enroll, Evaluation, Problem, Receipt, Trained, Withdraw
from edge_sdk.wire import (
    JSON_TYPE,
    JUDGMENT_TYPE,
    LINES_TYPE,
    MASKED_TYPE,
    PROBLEM_TYPE,
    TENSORS_TYPE,
    check_result,
    decode,
    encode,
    pack_lines,
)
from edge_server.failpoints import Reached
from edge_server.guard import GUARD, check_body, own, signer_of
from edge_server.intake import Intake
from edge_server.ledger import Ledger

MAX_CALL = 1 << 12  # bytes; an enrolment with the longest names, every character escaped, has 1.5 KB
MAX_REPORT = 1 << 16  # an evaluation with the longest names, every character escaped, has 51 KB, the shares of a cohort 30 KB
BODY_SECONDS = 600.0  # a slow line may take its time, but not hold a file for ever
IDLE_SECONDS = 60.0  # and a silent one is given up before
PAGE = 1000  # lines of synthetic data in an answer
Room = Callable[[int], None]  # told how many bytes of a body are next; see `Intake.room`
Spoken = Advertise | Shares | Reveal  # of secure averaging
LEDGER = web.AppKey("ledger", Ledger)
INTAKE = web.AppKey("intake", Intake)
log = logging.getLogger(__name__)
routes = web.RouteTableDef()


@routes.post("/v1/enroll")
async def enroll(request: web.Request) -> web.Response:
    message = decode(await _message(request), Enroll)
    if message.protocol != PROTOCOL:
        raise WireError("wrong-protocol", f"this server speaks protocol {PROTOCOL}, the device {message.protocol}")
    own(request, message.device)
    if guard := request.app.get(GUARD):
        await guard.admit(request, message.token)
    return _json(encode(await request.app[LEDGER].enroll(message.device, message.name, message.model)))


@routes.post("/v1/work")
async def work(request: web.Request) -> web.Response:
    message = decode(await _message(request), Ask)
    own(request, message.device)
    return _json(encode(request.app[LEDGER].ask(message.device, message.can_train)))


@routes.post("/v1/results")
async def results(request: web.Request) -> web.Response:
    ledger = request.app[LEDGER]
    tensors = dict.fromkeys((TENSORS_TYPE, MASKED_TYPE), ledger.body_limit)
    limit = {JSON_TYPE: MAX_REPORT, JUDGMENT_TYPE: ledger.judgment_limit, **tensors}.get(request.content_type)
    if limit is None:
        raise WireError("wrong-type", f"send {TENSORS_TYPE}, {MASKED_TYPE}, {JUDGMENT_TYPE} or {JSON_TYPE}", 415)
    with _room(request, limit) as room:
        return _json(encode(await _take(request, ledger, limit, room)))


async def _take(request: web.Request, ledger: Ledger, limit: int, room: Room) -> Receipt:
    """A result of one of the four types; on disk when this returns."""
    if request.content_type == JSON_TYPE:
        body = await _body(request, limit, room)
        report: Evaluation | Trained | Spoken = decode(body, Evaluation | Trained | Spoken)  # type: ignore[arg-type]  # a union is fine
        own(request, report.device)
        if isinstance(report, Spoken):
            return await ledger.take_answer(report)
        check_result(report)
        sha256 = hashlib.sha256(body).hexdigest()
        take = ledger.take_evaluation(report, sha256) if isinstance(report, Evaluation) else ledger.take_trained(report, sha256)
        return await take
    if request.content_type == JUDGMENT_TYPE:
        return await ledger.take_judgment(await _body(request, limit, room), signer_of(request))
    incoming = ledger.blobs.incoming()
    try:
        sha256 = await _stream(request, incoming, limit, room, ledger.blobs.reached)
        if request.content_type == MASKED_TYPE:
            return await ledger.take_masked(incoming, sha256, signer_of(request))
        return await ledger.take_update(incoming, sha256, signer_of(request))
    finally:
        incoming.unlink(missing_ok=True)


@routes.get("/v1/blobs/{sha256}")
async def blob(request: web.Request) -> web.StreamResponse:
    sha256 = request.match_info["sha256"]
    path = request.app[LEDGER].public(sha256)
    if path is None:
        raise WireError("unknown-blob", "there is no blob of this name", 404)
    answer = web.FileResponse(path.resolve(), headers={"Content-Type": "application/octet-stream"})
    if request.transport is not None and request.transport.get_extra_info("sslcontext"):
        answer.enable_compression(web.ContentCoding.identity)  # none, and no sendfile, for which asyncio reads 16 KiB a thread
    return answer


@routes.get("/v1/synthetic")
async def synthetic(request: web.Request) -> web.Response:
    since, limit = _number(request, "since", 0, 1 << 40), _number(request, "limit", PAGE, PAGE)
    body = pack_lines(await request.app[LEDGER].synthetic(since, limit, request.query.get("task")))
    etag = hashlib.sha256(body).hexdigest()
    headers = {"ETag": f'W/"{etag}"', "Vary": "Accept-Encoding", "Content-Type": LINES_TYPE}  # weak: gzip gives other bytes
    if any(known.value in (etag, "*") for known in request.if_none_match or ()):
        return web.Response(status=304, headers=headers)
    answer = web.Response(body=body, headers=headers)
    answer.enable_compression()
    return answer


@routes.post("/v1/synthetic/withdraw")
async def withdraw(request: web.Request) -> web.Response:
    await request.app[LEDGER].withdraw(decode(await _message(request), Withdraw).id)
    return _json(b"{}")


@routes.get("/v1/status")
async def status(request: web.Request) -> web.Response:
    return _json(encode(request.app[LEDGER].status()))


@routes.get("/healthz")
async def healthz(_: web.Request) -> web.Response:
    return web.Response(text="ok\n")


@routes.get("/readyz")
async def readyz(request: web.Request) -> web.Response:
    reason, guard = await request.app[LEDGER].ready(), request.app.get(GUARD)
    if reason and guard is not None and not guard.is_operator(request):
        reason = "not ready; the log says why, and this does where the admin token comes with the question"
    return web.Response(text=f"{reason or 'ok'}\n", status=503 if reason else 200)


@web.middleware
async def problems(request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> web.StreamResponse:
    """Every failure as a problem document; what nobody expected is logged here and told to nobody."""
    try:
        return await handler(request)
    except WireError as error:
        return _problem(error.status, error.code, error.detail, error.retry_after)
    except TimeoutError:
        within = f"within {BODY_SECONDS:.0f} seconds, or nothing of it for {IDLE_SECONDS:.0f}"
        answer = _problem(408, "too-slow", f"the body did not arrive {within}; send it again")
        answer.force_close()
        return answer
    except web.HTTPException as error:
        if error.status < 400:
            raise
        answer = _problem(error.status, f"http-{error.status}", error.reason)
        if "Allow" in error.headers:  # a 405 must say what is allowed
            answer.headers["Allow"] = error.headers["Allow"]
        return answer
    except (web.RequestPayloadError, ConnectionError):  # broken compression, or the device went away
        answer = _problem(400, "bad-message", "the body did not arrive whole, or is not compressed as its header says")
        answer.force_close()  # nobody knows where a next request would start
        return answer
    except Exception:
        log.exception("%s %s failed", request.method, request.path)
        return _problem(500, "internal", "the server failed; its log says why. Try again later")


@contextmanager
def _room(request: web.Request, limit: int) -> Iterator[Room]:
    """What counts the body's bytes while it is read and worked on. Raises: WireError: `too-large`, `too-many`, `busy`."""
    size = request.content_length
    if size is not None and size > limit:
        raise WireError("too-large", f"this may have {limit} bytes, and claims {size}", 413)
    ledger = request.app[LEDGER]
    most = 2 * max(ledger.body_limit, ledger.judgment_limit)  # one, and one that broke off
    with request.app[INTAKE].room(size or 0, signer_of(request), most) as room:
        yield room


async def _chunks(request: web.Request, limit: int, room: Room) -> AsyncIterator[bytes]:
    """The body as it arrives.

    Raises:
        WireError: `too-large`, `too-many`, `busy`.
        TimeoutError: it takes too long, or has stopped.
    """
    loop, received = asyncio.get_running_loop(), 0
    end = loop.time() + BODY_SECONDS
    while True:
        async with asyncio.timeout_at(min(end, loop.time() + IDLE_SECONDS)):
            chunk = await request.content.read(1 << 18)
        if not chunk:
            return
        received += len(chunk)
        if received > limit:
            raise WireError("too-large", f"this may have {limit} bytes", 413)
        room(len(chunk))
        yield chunk


async def _message(request: web.Request) -> bytes:
    """The body of a call that is only a small message, which strangers may send too."""
    with _room(request, MAX_CALL) as room:
        return await _body(request, MAX_CALL, room)


async def _body(request: web.Request, limit: int, room: Room) -> bytes:
    """The body in memory."""
    body = bytearray()
    async for chunk in _chunks(request, limit, room):
        body += chunk
    check_body(request, hashlib.sha256(body).hexdigest())
    return bytes(body)


def _number(request: web.Request, name: str, default: int, most: int) -> int:
    """A whole number of the query. Raises: WireError: `bad-query`."""
    text = request.query.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) <= 15 and int(text) <= most):
        raise WireError("bad-query", f"{name} is a whole number between 0 and {most}")
    return int(text)


async def _stream(request: web.Request, to: Path, limit: int, room: Room, reached: Reached) -> str:
    """Writes the body to a file, never holding it; returns its sha256."""
    digest = hashlib.sha256()
    with to.open("wb") as file:
        async for chunk in _chunks(request, limit, room):
            digest.update(chunk)
            file.write(chunk)
            file.flush()
            reached("upload-arriving")
    check_body(request, digest.hexdigest())
    return digest.hexdigest()


def _json(body: bytes) -> web.Response:
    return web.Response(body=body, content_type=JSON_TYPE)


def _problem(status: int, code: str, detail: str, retry_after: float | None = None) -> web.Response:
    headers = {} if retry_after is None else {"Retry-After": str(max(math.ceil(retry_after), 1))}
    problem = Problem(f"urn:tandem-edge:{code}", code.replace("-", " "), status, code, detail[:1000])  # it may quote a body
    return web.Response(status=status, body=encode(problem), content_type=PROBLEM_TYPE, headers=headers)
