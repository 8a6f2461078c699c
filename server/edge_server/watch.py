"""Sees every request and every event of an application: counts them for Prometheus, and logs uploads and refusals."""

from __future__ import annotations

import logging
import time
from contextvars import ContextVar
from dataclasses import dataclass

from aiohttp import web
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4

from edge_sdk.protocol import Problem
from edge_sdk.wire import MASKED_TYPE, PROBLEM_TYPE, TENSORS_TYPE, decode
from edge_server import logs
from edge_server.coordinator import Accepted, Answered, Evaluated, Event, Judged, Kept
from edge_server.guard import Handler, route_of, signer_of
from edge_server.ledger import Ledger
from edge_server.metrics import Metrics

RESULTS = "/v1/results"
SHORT = 12  # characters of a device's id
METRICS = web.AppKey("metrics", Metrics)
log = logging.getLogger(__name__)
routes = web.RouteTableDef()


@dataclass
class Exchange:
    """A request on its way.

    Args:
        began: when, on the clock that `time.monotonic` reads. upload: what is on disk of it.
    """

    began: float
    upload: logs.Fields | None = None


EXCHANGE = web.RequestKey("exchange", Exchange)
_current: ContextVar[Exchange | None] = ContextVar("exchange", default=None)  # whose event is being written


def watch(app: web.Application, ledger: Ledger) -> None:
    """Goes before the middleware that makes problem documents, so as to see these too."""
    metrics = app[METRICS] = Metrics(lambda: ledger.state, lambda: ledger.leases)
    app.middlewares.insert(0, _begin)
    app.on_response_prepare.append(_answered)
    app.add_routes(routes)
    ledger.on_commit += [metrics.committed, lambda event, _: _committed(event, ledger.state.version)]
    ledger.on_version.append(metrics.made)


@routes.get("/metrics")
async def exposition(request: web.Request) -> web.Response:
    return web.Response(body=request.app[METRICS].exposition(), headers={"Content-Type": CONTENT_TYPE_PLAIN_0_0_4})


@web.middleware
async def _begin(request: web.Request, handler: Handler) -> web.StreamResponse:
    exchange = request[EXCHANGE] = Exchange(time.monotonic())
    _current.set(exchange)
    return await handler(request)


async def _answered(request: web.Request, answer: web.StreamResponse) -> None:
    """Here and not in the middleware, which does not know yet what status a file will be sent with."""
    if (exchange := request.get(EXCHANGE)) is None or request.transport is None:  # whoever asked has hung up
        return
    seconds, received = time.monotonic() - exchange.began, request.content.total_bytes
    route = route_of(request) or "none"
    request.app[METRICS].answered(route, answer.status, received, seconds)
    fields: logs.Fields = {"route": route, "status": answer.status, "bytes": received, "seconds": round(seconds, 6)}
    if answer.content_type == PROBLEM_TYPE and isinstance(answer, web.Response) and isinstance(answer.body, bytes):
        code = decode(answer.body, Problem).code
        if route == RESULTS and request.content_type in (TENSORS_TYPE, MASKED_TYPE):
            request.app[METRICS].refused(code)
        logs.say(log, "refused", {**fields, "code": code, **_device(signer_of(request))})
    elif route == RESULTS:
        logs.say(log, "upload" if exchange.upload else "repeated", {**fields, **(exchange.upload or {})})


def _committed(event: Event, newest: int) -> None:
    """Keeps for the request that brought it what the log shall say of an event."""
    if (exchange := _current.get()) is None:
        return
    match event:
        case Accepted(device=device, version=version):
            exchange.upload = {"result": "update", **_device(device), "version": version, "staleness": newest - version}
        case Evaluated(device=device, version=version):
            exchange.upload = {"result": "evaluation", **_device(device), "version": version}
        case Kept(device=device, version=version):
            exchange.upload = {"result": "trained", **_device(device), "version": version}
        case Judged(device=device, sheet=sheet):
            exchange.upload = {"result": "judgment", **_device(device), "sheet": sheet}
        case Answered(answer):
            exchange.upload = {"result": type(answer).__name__.lower(), **_device(answer.device), "version": newest}


def _device(id: str | None) -> logs.Fields:
    return {"device": id[:SHORT]} if id else {}
