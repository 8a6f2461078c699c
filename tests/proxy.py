"""A network that can be as bad as one likes: a TCP proxy that cuts, delays, crumbles, flips and doubles what passes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

PIECE = 1 << 16
Kind = Literal["cut up", "cut down", "half-close", "late", "crumbs", "twice", "flip"]


@dataclass(frozen=True)
class Faults:
    """What one connection suffers; nothing by default.

    Args:
        up, down: bytes from and to the device after which the connection is cut on both sides; -1 for never.
        half: bytes from the device after which the server is told that no more will come; -1 for never.
        flip: number of the bit from the device that arrives changed; -1 for none.
        late: seconds that every piece waits. crumbs: every byte is a piece.
        twice: every request goes to the server a second time, on a connection of its own, before the device has its answer.
    """

    up: int = -1
    down: int = -1
    half: int = -1
    flip: int = -1
    late: float = 0.0
    crumbs: bool = False
    twice: bool = False


def chance(seed: int, kinds: tuple[Kind | None, ...], life: int = 4000) -> Callable[[int], Faults]:
    """A plan: connection n suffers one of `kinds`, None for a good one, and ends for good within `life` bytes from the device."""

    def faults(connection: int) -> Faults:
        rng = random.Random(f"{seed} {connection}")
        end, at = rng.randint(life // 2, life), rng.randrange(life // 2)
        match rng.choice(kinds):
            case "cut up":
                return Faults(up=at)
            case "cut down":
                return Faults(up=end, down=at // 2)
            case "half-close":
                return Faults(up=end, half=at)
            case "late":
                return Faults(up=end, late=0.001)
            case "crumbs":
                return Faults(up=end, crumbs=True)
            case "twice":
                return Faults(up=end, twice=True)
            case "flip":
                return Faults(up=end, flip=8 * at + rng.randrange(8))
            case None:
                return Faults(up=end)

    return faults


@dataclass
class Proxy:
    """Stands between devices and a server, without TLS; use as an async context manager.

    Args:
        server: URL of what is behind. plan: what the nth connection, from 0 on, suffers.
        url: what devices are told. suffered: what has come to pass, in order.
        again: status of the answer to each request that went to the server a second time.
    """

    server: str
    plan: Callable[[int], Faults]
    url: str = ""
    suffered: list[Kind] = field(default_factory=list)
    again: list[int] = field(default_factory=list)
    _connections: int = 0
    _open: set[asyncio.Task[None]] = field(default_factory=set)
    _listener: asyncio.Server | None = None

    async def __aenter__(self) -> Proxy:
        self._listener = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._listener.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._listener is not None
        self._listener.close()
        for task in self._open:
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        faults, self._connections = self.plan(self._connections), self._connections + 1
        answers, server = await self._behind()
        unanswered = bytearray()
        try:
            await asyncio.gather(
                self._up(faults, reader, server, writer, unanswered), self._down(faults, answers, writer, server, unanswered)
            )
        except (ConnectionError, asyncio.CancelledError):
            pass  # either side hung up in the middle, or the test is over
        finally:
            server.close()
            writer.close()
            self._open.discard(task)

    async def _behind(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        at = urlsplit(self.server)
        return await asyncio.open_connection(at.hostname, at.port)

    async def _up(
        self,
        faults: Faults,
        reader: asyncio.StreamReader,
        server: asyncio.StreamWriter,
        device: asyncio.StreamWriter,
        unanswered: bytearray,
    ) -> None:
        """From the device to the server, until one of them has enough."""
        passed = 0
        while data := await reader.read(PIECE):
            end = passed + len(data)
            if passed <= faults.flip // 8 < end:
                data = _flipped(data, faults.flip - 8 * passed)
                self.suffered.append("flip")
            ends = [at for at in (faults.up, faults.half) if 0 <= at <= end]
            data = data[: min(ends) - passed] if ends else data
            unanswered += data if faults.twice else b""
            await self._pass(data, server, faults)
            if ends and min(ends) == faults.up:
                self.suffered.append("cut up")
                device.close()
                break
            if ends:
                self.suffered.append("half-close")
                break
            passed = end
        if server.can_write_eof() and not server.is_closing():
            server.write_eof()

    async def _down(
        self,
        faults: Faults,
        reader: asyncio.StreamReader,
        device: asyncio.StreamWriter,
        server: asyncio.StreamWriter,
        unanswered: bytearray,
    ) -> None:
        """From the server to the device; the connection is over when the server says so."""
        passed = 0
        while data := await reader.read(PIECE):
            if unanswered:
                request, unanswered[:] = bytes(unanswered), b""
                await self._repeat(request)
            cut = 0 <= faults.down <= passed + len(data)
            await self._pass(data[: faults.down - passed] if cut else data, device, faults)
            if cut:
                self.suffered.append("cut down")
                break
            passed += len(data)
        device.close()
        server.close()

    async def _pass(self, data: bytes, writer: asyncio.StreamWriter, faults: Faults) -> None:
        size = 1 if faults.crumbs else PIECE
        for start in range(0, len(data), size):
            if faults.late:
                await asyncio.sleep(faults.late)
            writer.write(data[start : start + size])
            await writer.drain()
            await asyncio.sleep(0)  # the other side shall find it before the next piece is there
        if data and (faults.late or faults.crumbs):
            self.suffered.append("late" if faults.late else "crumbs")

    async def _repeat(self, request: bytes) -> None:
        answers, server = await self._behind()
        server.write(request)
        first = await answers.readline()
        server.close()
        self.suffered.append("twice")
        self.again.append(int(first.split()[1]))


def _flipped(data: bytes, bit: int) -> bytes:
    found = bytearray(data)
    found[bit // 8] ^= 1 << bit % 8
    return bytes(found)
