"""The aiohttp application around one ledger."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from aiohttp import web

from edge_server import openapi
from edge_server.guard import GUARD, Guard
from edge_server.handlers import INTAKE, LEDGER, problems, routes
from edge_server.intake import LIMIT, Intake
from edge_server.ledger import Ledger
from edge_server.watch import watch


def create_app(ledger: Ledger, guard: Guard | None = None, intake: Intake | None = None) -> web.Application:
    """Routes, error middleware, and the version maker, started and stopped with the application.

    Args:
        guard: who may call what; None lets everybody.
        intake: how many bytes of bodies may be on their way at once; None for as many as it is by default.
    """
    app = web.Application(middlewares=[problems], client_max_size=ledger.body_limit)
    app[LEDGER], app[INTAKE] = ledger, intake or Intake(max(LIMIT, ledger.body_limit))
    if guard is not None:
        app[GUARD], ledger.revoked = guard, guard.revoked
        app.middlewares.append(guard.middleware)
        app.on_response_prepare.append(guard.tell_time)
    app.add_routes([*routes, *openapi.routes])
    watch(app, ledger)
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
