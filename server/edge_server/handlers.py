"""HTTP handlers: bytes in, one call to the ledger, bytes out. Errors become RFC 9457 problem documents."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

from aiohttp import web

from edge_sdk.cohort import Advertise, Reveal, Shares
from edge_sdk.errors import WireError
from edge_sdk.protocol import PROTOCOL, Ask, Enroll, Evaluation, Problem, Trained, Withdraw
from edge_sdk.wire import (
    JSON_TYPE,
    JUDGMENT_TYPE,
    LINES_TYPE,
    MASKED_TYPE,
    MAX_JSON,
    PROBLEM_TYPE,
    TENSORS_TYPE,
    check_result,
    decode,
    encode,
    pack_lines,
)
from edge_server.guard import GUARD, check_body, own, signer_of
from edge_server.ledger import Ledger

BODY_SECONDS = 600.0  # a slow line may take its time, a silent one may not hold a file for ever
PAGE = 1000  # lines of synthetic data in an answer
Spoken = Advertise | Shares | Reveal  # of secure averaging
LEDGER = web.AppKey("ledger", Ledger)
log = logging.getLogger(__name__)
routes = web.RouteTableDef()


@routes.post("/v1/enroll")
async def enroll(request: web.Request) -> web.Response:
    message = decode(await _body(request), Enroll)
    if message.protocol != PROTOCOL:
        raise WireError("wrong-protocol", f"this server speaks protocol {PROTOCOL}, the device {message.protocol}")
    own(request, message.device)
    if guard := request.app.get(GUARD):
        await guard.admit(request, message.token)
    return _json(encode(await request.app[LEDGER].enroll(message.device, message.name, message.model)))


@routes.post("/v1/work")
async def work(request: web.Request) -> web.Response:
    message = decode(await _body(request), Ask)
    own(request, message.device)
    return _json(encode(request.app[LEDGER].plan(message.device, message.can_train)))


@routes.post("/v1/results")
async def results(request: web.Request) -> web.Response:
    ledger = request.app[LEDGER]
    if request.content_type == JSON_TYPE:
        body = await _body(request)
        report: Evaluation | Trained | Spoken = decode(body, Evaluation | Trained | Spoken)  # type: ignore[arg-type]  # a union is fine
        own(request, report.device)
        if isinstance(report, Spoken):
            return _json(encode(await ledger.take_answer(report)))
        check_result(report)
        sha256 = hashlib.sha256(body).hexdigest()
        take = ledger.take_evaluation(report, sha256) if isinstance(report, Evaluation) else ledger.take_trained(report, sha256)
        return _json(encode(await take))
    if request.content_type == JUDGMENT_TYPE:
        return _json(encode(await ledger.take_judgment(await _body(request, ledger.judgment_limit), signer_of(request))))
    if request.content_type not in (TENSORS_TYPE, MASKED_TYPE):
        raise WireError("wrong-type", f"send {TENSORS_TYPE}, {MASKED_TYPE}, {JUDGMENT_TYPE} or {JSON_TYPE}", 415)
    incoming = ledger.blobs.incoming()
    try:
        sha256 = await _stream(request, incoming, ledger.body_limit)
        if request.content_type == MASKED_TYPE:
            return _json(encode(await ledger.take_masked(incoming, sha256, signer_of(request))))
        return _json(encode(await ledger.take_update(incoming, sha256, signer_of(request))))
    finally:
        incoming.unlink(missing_ok=True)


@routes.get("/v1/blobs/{sha256}")
async def blob(request: web.Request) -> web.StreamResponse:
    sha256 = request.match_info["sha256"]
    path = request.app[LEDGER].public(sha256)
    if path is None:
        raise WireError("unknown-blob", "there is no blob of this name", 404)
    return web.FileResponse(path.resolve(), headers={"Content-Type": "application/octet-stream"})


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
    await request.app[LEDGER].withdraw(decode(await _body(request), Withdraw).id)
    return _json(b"{}")


@routes.get("/v1/status")
async def status(request: web.Request) -> web.Response:
    return _json(encode(request.app[LEDGER].status()))


@routes.get("/healthz")
async def healthz(request: web.Request) -> web.Response:
    trouble = request.app[LEDGER].trouble
    return web.Response(text=f"{trouble or 'ok'}\n", status=503 if trouble else 200)


@web.middleware
async def problems(request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> web.StreamResponse:
    """Every failure as a problem document; what nobody expected is logged here and told to nobody."""
    try:
        return await handler(request)
    except WireError as error:
        return _problem(error.status, error.code, error.detail)
    except TimeoutError:
        answer = _problem(408, "too-slow", f"the body did not arrive within {BODY_SECONDS:.0f} seconds; send it again")
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


async def _body(request: web.Request, limit: int = MAX_JSON) -> bytes:
    """A small body. Raises: WireError: `too-large`."""
    if request.content_length is not None and request.content_length > limit:
        raise WireError("too-large", f"a message may have {limit} bytes", 413)
    body = bytearray()
    async with asyncio.timeout(BODY_SECONDS):
        async for chunk in request.content.iter_chunked(1 << 16):
            body += chunk
            if len(body) > limit:
                raise WireError("too-large", f"a message may have {limit} bytes", 413)
    check_body(request, hashlib.sha256(body).hexdigest())
    return bytes(body)


def _number(request: web.Request, name: str, default: int, most: int) -> int:
    """A whole number of the query. Raises: WireError: `bad-query`."""
    text = request.query.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) <= 15 and int(text) <= most):
        raise WireError("bad-query", f"{name} is a whole number between 0 and {most}")
    return int(text)


async def _stream(request: web.Request, to: Path, limit: int) -> str:
    """Writes the body to a file, never holding it; returns its sha256. Raises: WireError: `too-large`."""
    if request.content_length is not None and request.content_length > limit:
        raise WireError("too-large", f"an update may have {limit} bytes, this one claims {request.content_length}", 413)
    received, digest = 0, hashlib.sha256()
    with to.open("wb") as file:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.content.iter_chunked(1 << 18):
                received += len(chunk)
                if received > limit:
                    raise WireError("too-large", f"an update may have {limit} bytes", 413)
                digest.update(chunk)
                file.write(chunk)
    check_body(request, digest.hexdigest())
    return digest.hexdigest()


def _json(body: bytes) -> web.Response:
    return web.Response(body=body, content_type=JSON_TYPE)


def _problem(status: int, code: str, detail: str) -> web.Response:
    problem = Problem(f"urn:tandem-edge:{code}", code.replace("-", " "), status, code, detail[:1000])  # it may quote a body
    return web.Response(status=status, body=encode(problem), content_type=PROBLEM_TYPE)
