"""The aiohttp application around one ledger."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

from aiohttp import web

from edge_server.handlers import LEDGER, problems, routes
from edge_server.ledger import Ledger

log = logging.getLogger(__name__)


def create_app(ledger: Ledger) -> web.Application:
    """Routes, error middleware, and the version maker, started and stopped with the application."""
    app = web.Application(middlewares=[problems], client_max_size=ledger.body_limit)
    app[LEDGER] = ledger
    app.add_routes(routes)
    app.cleanup_ctx.append(_version_maker)
    return app


async def _version_maker(app: web.Application) -> AsyncIterator[None]:
    ledger = app[LEDGER]
    await ledger.open()
    task = asyncio.create_task(ledger.make_versions())
    task.add_done_callback(_complain)
    yield
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    ledger.close()


def _complain(task: asyncio.Task[None]) -> None:
    """A version maker that dies must not die unheard: devices would wait for ever."""
    if not task.cancelled() and (error := task.exception()):
        log.critical("making versions stopped: %s; restart the server", error, exc_info=error)
