"""The device's way to the server: a one-method seam, its aiohttp form, and the calls of the protocol on top of it.

Foreign errors end here: a transport raises `Unreachable`, a call raises `Unreachable`, `Refused` or `WireError`.
"""

from __future__ import annotations

import hashlib
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

import aiohttp

from edge_sdk.bundle import File
from edge_sdk.errors import AssetError, Refused, SettingsError, Unreachable, WireError
from edge_sdk.protocol import PROTOCOL, Ask, Enroll, Line, Manifest, Problem, Receipt, Status, Withdraw, Work
from edge_sdk.wire import JSON_TYPE, MAX_JSON, PROBLEM_TYPE, decode, encode, unpack_lines


@dataclass(frozen=True)
class Response:
    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


class Transport(Protocol):
    """One exchange with the server; `edge_sdk.testing.ServerSimulator` is another implementation."""

    async def request(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        into: Path | None = None,
        limit: int = MAX_JSON,
    ) -> Response:
        """Sends `body` and returns the answer.

        Args:
            into: file to append a successful body to, instead of returning it.
            limit: most bytes of the answer that are read.

        Raises:
            Unreachable: no whole answer within `limit` came back.
        """
        ...


class HttpTransport:
    """HTTP/1.1 through aiohttp; use as an async context manager.

    Args:
        timeout: seconds without a byte.
        ca: file of the certificates that the server's must come from; None for those the system trusts.
        bearer: the operator's token, for the operator's calls.

    Raises:
        SettingsError: `server` is not a URL, or `ca` no file of certificates.
    """

    def __init__(self, server: str, timeout: float = 60.0, ca: Path | None = None, bearer: str = "") -> None:
        self._server = _url(server).rstrip("/")
        if not _has_host(self._server):
            raise SettingsError(f"{server!r} is not a server's URL, e.g. http://192.168.1.5:8440")
        if ca is not None and not self._server.startswith("https://"):
            raise SettingsError(f"a certificate was given, but {self._server} is not an https:// URL")
        self._tls = True if ca is None else _trusting(ca)
        self._headers = {"Authorization": f"Bearer {bearer}"} if bearer else {}
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> HttpTransport:
        connector = aiohttp.TCPConnector(ssl=self._tls)
        self._session = aiohttp.ClientSession(
            timeout=self._timeout, raise_for_status=False, connector=connector, headers=self._headers
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def request(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        into: Path | None = None,
        limit: int = MAX_JSON,
    ) -> Response:
        assert self._session is not None, "use `async with HttpTransport(...)`"
        try:
            async with self._session.request(
                method, self._server + path, data=body or None, headers=headers, allow_redirects=False
            ) as answer:
                keep = into if answer.status in (200, 206) else None
                if keep is not None and answer.status == 200:
                    keep.unlink(missing_ok=True)  # the server sent the whole file, not the rest of it
                content, received = bytearray(), 0
                async for chunk in answer.content.iter_chunked(1 << 18):
                    received += len(chunk)
                    if received > limit:
                        raise Unreachable(f"the answer to {method} {path} is longer than {limit} bytes")
                    if keep is None:
                        content += chunk
                    else:
                        _append(keep, chunk)
                return Response(answer.status, bytes(content), dict(answer.headers))
        except (aiohttp.ClientConnectorCertificateError, aiohttp.ClientConnectorSSLError) as error:
            reason = " ".join(str(error).split())
            raise Unreachable(f"no trusted TLS with {self._server} ({reason}); name the file of its certificate: --ca") from error
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__  # some are several lines
            raise Unreachable(f"no answer from {self._server} ({reason}); is the server running?") from error


def _trusting(ca: Path) -> ssl.SSLContext:
    """Raises: SettingsError: the file cannot be read, or holds no certificate."""
    try:
        context = ssl.create_default_context(cafile=ca)
    except OSError as error:  # an SSLError is one
        raise SettingsError(f"{ca} is no PEM file of certificates ({error.strerror or error})") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def _url(server: str) -> str:
    """With a scheme; "" where it has another one, or is a bare word."""
    if server.startswith(("http://", "https://")):
        return server
    bare = server.partition("/")[0]
    return f"http://{server}" if "://" not in server and (bare == "localhost" or "." in bare or ":" in bare) else ""


def _has_host(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:  # no such port, or half an IPv6 address
        return False


def _append(path: Path, chunk: bytes) -> None:
    """Raises: AssetError: the disk is full or not ours; what was written before stays for the next try."""
    try:
        with path.open("ab") as file:
            file.write(chunk)
    except OSError as error:
        raise AssetError(f"cannot write {path}: {error.strerror}; make room, the download goes on where it stopped") from error


class Api:
    """The calls of the protocol."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    async def enroll(self, device: str, name: str, model: str = "", token: str = "") -> Manifest:
        return decode(await self._post("/v1/enroll", encode(Enroll(PROTOCOL, device, name, model, token))), Manifest)

    async def ask(self, device: str, can_train: bool) -> Work:
        body = await self._post("/v1/work", encode(Ask(device, can_train)))
        return decode(body, Work)  # type: ignore[arg-type]  # a union is fine for msgspec

    async def send(self, content_type: str, body: bytes) -> Receipt:
        return decode(await self._post("/v1/results", body, content_type), Receipt)

    async def synthetic(self, since: int, limit: int) -> list[Line]:
        """A page of the feed of synthetic data: at most `limit` lines after line `since`."""
        path = f"/v1/synthetic?since={since}&limit={limit}"
        body = _ok(await self._transport.request("GET", path, limit=64 * MAX_JSON)).body
        return unpack_lines(body, Line)  # type: ignore[arg-type]  # a union is fine for msgspec

    async def withdraw(self, sample: str) -> None:
        """Takes a sample of the feed out of use."""
        await self._post("/v1/synthetic/withdraw", encode(Withdraw(sample)))

    async def status(self) -> Status:
        return decode(_ok(await self._transport.request("GET", "/v1/status", limit=64 * MAX_JSON)).body, Status, 64 * MAX_JSON)

    async def blob(self, file: File, to: Path) -> None:
        """Downloads a content-addressed file to `to`, going on where an earlier try stopped.

        Raises:
            AssetError: the bytes are not those of the hash; the partial file is removed.
        """
        part = to.with_name(to.name + ".part")
        have = part.stat().st_size if part.exists() else 0
        if have < file.size:
            headers = {"Range": f"bytes={have}-"} if have else {}
            _ok(await self._transport.request("GET", f"/v1/blobs/{file.sha256}", headers=headers, into=part, limit=file.size))
        part.touch()  # an empty answer writes nothing
        with part.open("rb") as written:
            found = hashlib.file_digest(written, "sha256").hexdigest()
        if found != file.sha256:
            part.unlink()
            raise AssetError(f"{to.name} arrived damaged (sha256 {found[:12]}, expected {file.sha256[:12]}); it is fetched again")
        part.replace(to)

    async def blob_bytes(self, sha256: str, limit: int) -> bytes:
        """A content-addressed blob in memory. Raises: AssetError: the bytes are not those of the hash."""
        body = _ok(await self._transport.request("GET", f"/v1/blobs/{sha256}", limit=limit)).body
        if hashlib.sha256(body).hexdigest() != sha256:
            raise AssetError(f"blob {sha256[:12]} arrived damaged; it is fetched again")
        return body

    async def _post(self, path: str, body: bytes, content_type: str = JSON_TYPE) -> bytes:
        return _ok(await self._transport.request("POST", path, body, {"Content-Type": content_type})).body


def _ok(response: Response) -> Response:
    """Raises: Refused: the server sent a problem document. Unreachable: something that is not our server answered."""
    if response.status in (200, 201, 206):
        return response
    kind = response.headers.get("Content-Type", "").split(";")[0].strip()
    retry_after = _seconds(response.headers.get("Retry-After"))
    if kind == PROBLEM_TYPE:
        try:
            problem = decode(response.body, Problem)
        except WireError as error:
            raise Unreachable(f"the server's error could not be read: {error.detail}") from error
        if retry_after is None and problem.status >= 500:
            retry_after = 0.0
        raise Refused(problem.code, problem.detail, problem.status, retry_after)
    raise Unreachable(f"HTTP {response.status} without a problem document: is this an edge-server?")


def _seconds(value: str | None) -> float | None:
    """Whole seconds; a date, which HTTP also allows, is None."""
    return float(value) if value is not None and value.isascii() and value.isdigit() else None
