"""The aiohttp application around one ledger."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from aiohttp import web

from edge_server.guard import GUARD, Guard
from edge_server.handlers import LEDGER, problems, routes
from edge_server.ledger import Ledger


def create_app(ledger: Ledger, guard: Guard | None = None) -> web.Application:
    """Routes, error middleware, and the version maker, started and stopped with the application.

    Args:
        guard: who may call what; None lets everybody.
    """
    app = web.Application(middlewares=[problems], client_max_size=ledger.body_limit)
    app[LEDGER] = ledger
    if guard is not None:
        app[GUARD] = guard
        app.middlewares.append(guard.middleware)
        app.on_response_prepare.append(guard.tell_time)
    app.add_routes(routes)
    app.cleanup_ctx.append(_version_maker)
    return app


async def _version_maker(app: web.Application) -> AsyncIterator[None]:
    ledger = app[LEDGER]
    await ledger.open()
    task = asyncio.create_task(ledger.make_versions())
    yield
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    await ledger.rest()
    ledger.close()
