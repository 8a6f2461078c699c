"""What the server costs: devices push the updates of a LoRA adapter to a real `edge-server` process on this machine.

The payload is that of a LoRA of rank 8 on q and v of a model like Qwen2.5-0.5B: 540,672 float32 numbers in 96 tensors, or the
same number in one (`flat`). What a device has learned is 1e-3 everywhere, so that after R versions the adapter must be
start + R * 1e-3: a run where it is not is void, and the bench fails. In int8 it may lack what error feedback still owes.

    sync   each device a process of its own; a version is made of all of them: FedAvg, the median round counts
    async  a version is made of the first half that arrives; the others' updates go into the next
    crowd  64 devices in one process: memory with 2, 8 and 64 of them, then with 64 uploads that are all half there, then
           updates a second, all sent at once; a version is made of each 4, the default

    bare        plain HTTP, and whoever comes is let in
    production  TLS, tokens, signed requests

Both check everything and have everything on disk before they acknowledge it; the server cannot do without. Updates are as long as
each other, so `clip_norm` stands at its default and clips none. Clocks start at version 1: devices have started, and one round
is over. Bytes are counted by a relay before each device, in rows of their own, of which the times do not count.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np
from rich.progress import track
from rich.table import Table

from bench import served
from bench.pushing import SECONDS, STEP, Bytes, Place, crowd, push
from bench.report import Result
from bench.served import Served, Tier
from edge_sdk.adapters import AdapterSpec, Arrays, Slot
from edge_sdk.assets import cache_folder
from edge_sdk.codec import STEPS, Encoding
from edge_sdk.errors import DataError
from edge_server.systems.lpfl import LpFl

OUT = {"q_proj": 896, "v_proj": 128}
SLOTS = tuple(Slot(f"model.layers.{layer}.self_attn.{name}", 896, out) for layer in range(24) for name, out in OUT.items())
TENSORS = AdapterSpec(SLOTS, rank=8, alpha=16.0)
NUMBERS = sum(math.prod(shape) for shape in TENSORS.update_shapes().values())
FLAT = AdapterSpec((Slot("model.layers.0.flat", 1, NUMBERS),), rank=1, alpha=1.0, freeze_a=True)  # B alone travels up
IDEAL = 4 * NUMBERS  # bytes of an update
TOLERANCE = 1e-6
OWED = STEP / (2 * STEPS)  # of an int8 update, what comes with the next one: at most half a scale
STAGES, WAVES = (2, 8, 64), 4  # of the crowd: devices, and how often all send at once
TARGETS = {
    "seconds_per_round": ("<=", 0.25, ".3f"),
    "server_cpu_seconds_per_update": ("<=", 0.02, ".4f"),
    "in_flight_64_mb": ("<=", 150, ".0f"),
    "updates_per_second": (">=", 40, ".0f"),
    "bytes_ratio_fp32": ("<=", 1.02, ".4f"),
    "bytes_ratio_int8": ("<=", 0.27, ".4f"),
}


@dataclass(frozen=True)
class Cell:
    """One run.

    Args:
        buffer: updates that make a version; as many as clients for synchronous rounds.
        rounds: versions that are measured, after the first.
        counted: bytes are counted, and slow it down.
    """

    tier: Tier
    clients: int
    buffer: int
    flat: bool = False
    encoding: Encoding = "fp32"
    rounds: int = 10
    counted: bool = False

    @property
    def sync(self) -> bool:
        return self.buffer == self.clients

    @property
    def spec(self) -> AdapterSpec:
        return FLAT if self.flat else TENSORS


class Peer(msgspec.Struct, frozen=True):
    """Another system's run of the same payload, as one line of JSON; what else it says is left out."""

    system: str
    nodes: int
    rounds: int
    flat: bool
    median_seconds_per_round: float
    max_abs_error: float
    server_cpu_seconds_per_update: float
    server_peak_mb: float
    database: bool = False


def cells(rounds: int) -> list[Cell]:
    tiers: tuple[Tier, ...] = get_args(Tier)
    found = [Cell(tier, n, n, rounds=rounds) for tier in tiers for n in (2, 4, 8)]
    found += [Cell(tier, 4, 4, flat=True, rounds=rounds) for tier in tiers]
    found += [Cell("production", n, n // 2, rounds=rounds) for n in (4, 8)]
    encodings: tuple[Encoding, ...] = ("fp32", "int8")
    return [*found, *(Cell("production", 4, 4, encoding=each, rounds=rounds, counted=True) for each in encodings)]


def run(full: bool, peers: Path | None = None) -> Result:
    """Ten measured rounds, thirty with `full`.

    Args:
        peers: file of other systems' runs, one JSON line each.

    Raises:
        RuntimeError: a run is void. DataError: `peers` holds something else, or a void run.
    """
    others = [] if peers is None else peer_rows(peers.read_bytes())
    rows = [measure(cell) for cell in track(cells(30 if full else 10), "runs", transient=True)]
    tiers: tuple[Tier, ...] = get_args(Tier)
    rows += [measure_crowd(tier) for tier in track(tiers, "crowds", transient=True)]
    return result(rows, others)


def result(rows: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> Result:
    """Of our rows and those of peers, in one table."""
    found = summary(rows)
    return Result("lora_push", [*rows, *others], found, _table([*rows, *others]), [*targets(found), *_crowds(rows)])


def measure(cell: Cell) -> dict[str, Any]:
    """One run, with a server and processes of its own. Raises: RuntimeError: it is void."""
    settings = LpFl(
        versions=cell.rounds + 1,
        buffer_size=cell.buffer,
        max_staleness=0 if cell.sync else 8,
        wait_seconds=0.05,
        evaluate_every=0,
        upload=cell.encoding,
    )
    spawn = multiprocessing.get_context("spawn")
    with _folder() as folder, ProcessPoolExecutor(cell.clients, mp_context=spawn) as pool:
        with served.serve(folder, cell.tier, cell.spec, settings) as server:
            jobs = [pool.submit(push, replace(place, counted=cell.counted)) for place in _places(server, cell.clients)]
            counted = [job.result() for job in jobs]
            peak = server.peak_mb()
        names = list(cell.spec.update_shapes())
        error = max_abs_error(server.adapter(0), server.adapter(settings.versions), names, settings.versions)
    check(error, cell.encoding, cell)
    first, last = server.moments[0], server.moments[-1]
    spans = [after.seconds - before.seconds for before, after in itertools.pairwise(server.moments)]
    return {
        "system": "tandem-edge",
        "mode": "sync" if cell.sync else "async",
        **asdict(cell),
        "seconds_per_round": statistics.median(spans),
        "server_cpu_seconds_per_update": (last.cpu - first.cpu) / (cell.buffer * cell.rounds),
        "server_peak_mb": peak,
        "max_abs_error": error,
        **(bytes_ratios(counted, settings.versions) if cell.counted else {}),
    }


def measure_crowd(tier: Tier, stages: Sequence[int] = STAGES) -> dict[str, Any]:
    """Memory with so many devices at each stage, with half an upload of each there, and updates a second."""
    size, buffer = stages[-1], 4
    settings = LpFl(versions=10**6, buffer_size=buffer, max_staleness=10**6, wait_seconds=0.05, evaluate_every=0)
    with _folder() as folder, served.serve(folder, tier, TENSORS, settings) as server:
        versions = (stages[-1] + (1 + WAVES) * size) // buffer  # all in turn, then all at once
        row = asyncio.run(_measure_crowd(server, _places(server, size), stages))
        _wait(server, versions)
        error = max_abs_error(server.adapter(0), server.adapter(versions), list(TENSORS.update_shapes()), versions)
    row = {"system": "tandem-edge", "mode": "crowd", "tier": tier, "clients": size, "buffer": buffer, **row}
    check(error, settings.upload, row)
    return {**row, "max_abs_error": error}


async def _measure_crowd(server: Served, places: Sequence[Place], stages: Sequence[int]) -> dict[str, Any]:
    peaks: dict[int, float] = {}
    async with crowd(places[0]) as devices:
        for before, until in itertools.pairwise((0, *stages)):
            for place in places[before:until]:
                await devices.join(place)
            await devices.send_in_turn(devices.members[before:])
            peaks[until] = server.peak_mb()
        await devices.send_at_once(halted=True)
        halted = server.peak_mb()
        cpu, waves = server.cpu_seconds(), [await devices.send_at_once() for _ in range(WAVES)]
        cpu = server.cpu_seconds() - cpu
    return {
        "peak_mb": {str(many): peak for many, peak in peaks.items()},
        "in_flight_mb": halted,
        "updates_per_second": len(places) / statistics.median(waves),
        "server_cpu_seconds_per_update": cpu / (len(places) * WAVES),
        "server_peak_mb": server.peak_mb(),
    }


def _wait(server: Served, versions: int) -> None:
    """Until there are so many, and every update is in one. Raises: RuntimeError: they do not come."""
    end = time.monotonic() + SECONDS
    while len(server.moments) < versions:
        if time.monotonic() > end:
            raise RuntimeError(f"void: of {versions} versions the server has made {len(server.moments)}")
        time.sleep(0.05)


def max_abs_error(start: Arrays, final: Arrays, names: Sequence[str], versions: int) -> float:
    """How far a number of the arrays `names` is from start + versions * 1e-3, at most; NaN where one is NaN."""
    return float(np.max([np.abs(final[name] - (start[name].astype(np.float64) + versions * STEP)).max() for name in names]))


def check(error: float, encoding: Encoding, what: object) -> None:
    """Raises: RuntimeError: the run `what` is void."""
    if not error <= TOLERANCE + (OWED if encoding == "int8" else 0):
        raise RuntimeError(f"void: the adapter is not start + versions * {STEP}, max_abs_error {error:.3g}: {what}")


def bytes_ratios(counted: Sequence[Bytes], versions: int) -> dict[str, float]:
    """Bytes on the wire over those of bare float32: a device sends an update a version, and fetches one version more."""
    up, down = sum(c.up for c in counted), sum(c.down for c in counted)
    return {"up_ratio": up / (len(counted) * versions * IDEAL), "down_ratio": down / (len(counted) * (versions + 1) * IDEAL)}


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of 4 clients in synchronous rounds with 96 tensors; of the crowd, in production."""
    four = [r for r in rows if r["mode"] == "sync" and r["clients"] == 4 and not r["flat"]]
    plain = {r["tier"]: r for r in four if not r["counted"]}
    ratios = {r["encoding"]: r["up_ratio"] for r in four if r["counted"]}
    many = next(r for r in rows if r["mode"] == "crowd" and r["tier"] == "production")
    keys = ("seconds_per_round", "server_cpu_seconds_per_update", "server_peak_mb")
    return {
        **{tier: {key: plain[tier][key] for key in keys} for tier in get_args(Tier)},
        "in_flight_64_mb": many["in_flight_mb"],
        "updates_per_second": many["updates_per_second"],
        **{f"bytes_ratio_{encoding}": ratio for encoding, ratio in ratios.items()},
    }


def peer_rows(body: bytes) -> list[dict[str, Any]]:
    """Rows of other systems' runs. Raises: DataError: a line is no run, or a void one."""
    try:
        peers = [msgspec.json.decode(line, type=Peer) for line in body.splitlines() if line.strip()]
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DataError(f"--peer wants a line of JSON a run, as ../shared/peers/*/run.py prints it: {error}") from error
    if void := [peer for peer in peers if not peer.max_abs_error <= TOLERANCE]:
        raise DataError(f"a run of {void[0].system} is void: max_abs_error {void[0].max_abs_error:.3g}")
    return [_peer_row(peer) for peer in peers]


def _peer_row(peer: Peer) -> dict[str, Any]:
    return {
        "system": peer.system,
        "mode": "sync",
        "tier": "database" if peer.database else "bare",
        "clients": peer.nodes,
        "buffer": peer.nodes,
        "flat": peer.flat,
        "encoding": "fp32",
        "rounds": peer.rounds,
        "seconds_per_round": peer.median_seconds_per_round,
        "server_cpu_seconds_per_update": peer.server_cpu_seconds_per_update,
        "server_peak_mb": peer.server_peak_mb,
        "max_abs_error": peer.max_abs_error,
    }


def targets(found: Mapping[str, Any]) -> list[str]:
    """Which are kept; times and CPU in production."""
    told = []
    for name, (sign, target, form) in TARGETS.items():
        value = found[name] if name in found else found["production"][name]
        kept = value <= target if sign == "<=" else value >= target
        told.append(f"{name} {value:{form}} (target {sign} {target:g}): {'kept' if kept else 'MISSED'}")
    return told


def _crowds(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        f"crowd, {r['tier']}: peak MB with {', '.join(f'{n} devices {mb:.0f}' for n, mb in r['peak_mb'].items())}, with "
        f"{r['clients']} uploads in flight {r['in_flight_mb']:.0f}; {r['updates_per_second']:.0f} updates/s"
        for r in rows
        if r["mode"] == "crowd"
    ]


HEADS = ("system", "tier", "mode", "of", "tensors", "numbers", "s/round", "CPU s/update", "MB")


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title=f"pushes of {NUMBERS:,} numbers; bytes over those of bare float32; rows with bytes are slowed by a relay")
    for head in (*HEADS, "up", "down", "error"):
        table.add_column(head, justify="left" if head in ("system", "tier", "mode", "numbers") else "right")
    for r in rows:
        if r["mode"] != "crowd":
            counted = [f"{r[key]:.4f}" if key in r else "" for key in ("up_ratio", "down_ratio")]
            table.add_row(*_cost(r), *counted, f"{r['max_abs_error']:.0e}")
    return table


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """For a page, without the rows that a relay slowed; a test holds the two together."""
    shown = [_cost(r) for r in rows if r["mode"] != "crowd" and not r.get("counted")]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (HEADS, ["---"] * len(HEADS), *shown))


def _cost(r: Mapping[str, Any]) -> tuple[str, ...]:
    what = r["system"], r["tier"], r["mode"], f"{r['buffer']}/{r['clients']}", "1" if r["flat"] else "96", r["encoding"]
    return *what, f"{r['seconds_per_round']:.3f}", f"{r['server_cpu_seconds_per_update']:.3f}", f"{r['server_peak_mb']:.0f}"


def _places(server: Served, count: int) -> list[Place]:
    return [Place(server.url, f"d{i}", server.ca, token) for i, token in enumerate(server.tokens(count))]


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """On the disk of the cache: the folder for temporary files may be memory, where syncing costs nothing."""
    root = cache_folder() / "bench"
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root) as folder:
        yield Path(folder)
