"""Who may call what, before a handler reads a byte: devices by their signature, the operator by the admin token.

`gate.py` says which signed requests are new, `admission.py` which devices may take part.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable

from aiohttp import web

from edge_sdk import identity
from edge_sdk.errors import WireError
from edge_sdk.identity import Claim, Clock
from edge_server.admission import Admission
from edge_server.coordinator import check_signer
from edge_server.gate import Gate

OPEN = {"/healthz", "/readyz", "/openapi.json"}
ADMIN = {"/v1/status", "/v1/synthetic/withdraw", "/metrics"}
BOTH = {"/v1/synthetic"}
ENROLL = "/v1/enroll"
CLAIM = web.RequestKey("claim", Claim)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Guard:
    """Stands before the handlers of an application.

    Args:
        admission: tokens and devices.
        gate: of this start of the server.
        admin: the operator's token.
        now: seconds since 1970, which never go back.
    """

    def __init__(self, admission: Admission, gate: Gate, admin: str, now: Callable[[], float]) -> None:
        self._admission = admission
        self._gate = gate
        self._admin = admin
        self._now = now
        self._admitting = asyncio.Lock()  # one at a time: where the file is locked, those who wait shall not take every thread

    async def tell_time(self, request: web.Request, answer: web.StreamResponse) -> None:
        """Every 401 says how it is done: what a device corrects itself by, or that the operator's token is wanted."""
        if answer.status == 401:
            clock = Clock(self._gate.epoch, int(self._now())).header
            answer.headers["WWW-Authenticate"] = "Bearer" if route_of(request) in ADMIN else clock

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Raises: WireError: whoever sends this may not."""
        route = route_of(request)
        if route in OPEN:
            return await handler(request)
        if route in ADMIN or (route in BOTH and "Authorization" in request.headers):
            self._check_admin(request)
            return await handler(request)
        claim, signature = identity.read(request.headers)
        self._gate.check_time(claim, self._now())
        path, _, query = request.raw_path.partition("?")
        identity.verify(request.method, path, query, claim, signature)
        if route != ENROLL:
            self._admission.known(claim.device)
            self._gate.take(claim, self._now())
        request[CLAIM] = claim
        return await handler(request)

    async def admit(self, request: web.Request, token: str) -> None:
        """Lets the sender of a request to enrol in. Raises: WireError: what `Admission.admit` and `Gate.take` refuse."""
        claim = request[CLAIM]
        if not self._admission.is_in(claim.device, token, self._now()):  # here, so that strangers lock nothing
            async with self._admitting:
                await asyncio.to_thread(self._admission.admit, claim.device, token, self._now())
        self._gate.take(claim, self._now())  # only now: strangers shall not fill the server's memory

    def revoked(self) -> set[str]:
        """The devices that are shut out."""
        return {device for device, out in self._admission.devices().items() if out}

    def is_operator(self, request: web.Request) -> bool:
        """Whether the admin token comes with a request."""
        kind, _, token = request.headers.get("Authorization", "").partition(" ")
        return kind == "Bearer" and hmac.compare_digest(token.encode(errors="surrogateescape"), self._admin.encode())

    def _check_admin(self, request: web.Request) -> None:
        if not self.is_operator(request):
            raise WireError("not-admin", "this is the operator's: send the admin token, --admin-token-file FILE", 401)


def route_of(request: web.Request) -> str:
    """The route whose handler is to be called, however the path is spelled; "" for none."""
    resource = request.match_info.route.resource
    return "" if resource is None else resource.canonical


def own(request: web.Request, device: str) -> None:
    """Raises: WireError: `wrong-device`: the message is another device's than the one that signed the request."""
    check_signer(device, signer_of(request))


def signer_of(request: web.Request) -> str | None:
    """The device that signed a request; None on a server that does not know its devices."""
    claim = request.get(CLAIM)
    return None if claim is None else claim.device


def check_body(request: web.Request, sha256: str) -> None:
    """Raises: WireError: `bad-digest`: what arrived is not what was signed."""
    claim = request.get(CLAIM)
    if claim is not None and claim.sha256 != sha256:
        raise WireError("bad-digest", "the body is not the one that was signed; send it again", 400)


GUARD = web.AppKey("guard", Guard)
