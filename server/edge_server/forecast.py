"""`edge-server simulate`: what a run's settings would do with a fleet: speed, staleness, wasted work.

Nothing is learned; `python -m bench async_vs_sync` does that.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edge_sdk.adapters import AdapterSpec, Arrays, Slot
from edge_sdk.errors import SettingsError
from edge_sdk.verbs import Learned
from edge_server import settings as run_settings
from edge_server import simulate
from edge_server.settings import SYSTEMS
from edge_server.simulate import Delays, Fleet, HalfNormal, Tiers, Version
from edge_server.systems.lpfl import LpFl

STAND_IN = AdapterSpec((Slot("layer.0", 1, 1),), rank=1, alpha=1.0)


class Staleness(msgspec.Struct, frozen=True):
    """Of the updates that versions were made of, in versions."""

    median: int
    p90: int
    p99: int
    max: int


class Forecast(msgspec.Struct, frozen=True):
    """What came of a simulated run.

    Args:
        versions: that were made, of those `wanted`. hours: virtual ones until the last.
        uploads: updates that arrived, repeated and refused ones too. contributors: devices with an update in some version.
        wasted: share of the trainings that came to nothing: refused as too stale, or lost with the device's process.
    """

    devices: int
    versions: int
    wanted: int
    hours: float
    versions_per_hour: float
    uploads: int
    contributors: int
    staleness: Staleness
    wasted: float


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own."""
    parser.add_argument("--config", type=Path, required=True, help="TOML file of the run, e.g. examples/minilm.toml")
    parser.add_argument("--system", choices=SYSTEMS, help="another system than the file's, with its table of settings")
    parser.add_argument("--devices", type=int, default=1000, help="how many take part (default: %(default)s)")
    parser.add_argument("--versions", type=int, help="how many are made (default: the file's)")
    parser.add_argument("--buffer-size", type=int, help="updates that make a version (default: the file's)")
    parser.add_argument("--max-staleness", type=int, help="versions an update may be behind (default: the file's)")
    parser.add_argument("--concurrency", type=int, help="devices that may train at once (default: the file's)")
    parser.add_argument("--delays", choices=("tiers", "half-normal"), default="tiers", help="(default: %(default)s)")
    parser.add_argument("--means", type=float, nargs="+", help="tiers: seconds of training (default: 100 200 400)")
    parser.add_argument("--spread", type=float, help="tiers: standard deviation, as a share of the mean (default: 0.01)")
    parser.add_argument("--scale", type=float, help="half-normal: training takes |N(0, SCALE)| seconds (default: 200)")
    parser.add_argument("--communication", type=float, default=5.0, help="seconds an update takes (default: %(default)s)")
    parser.add_argument("--dropout", type=float, default=0.0, help="share of trainings whose result is lost")
    parser.add_argument("--away-seconds", type=float, default=0.0, help="until a device that lost one starts anew")
    parser.add_argument("--gone", type=float, default=0.0, help="share of devices that leave for good while they train")
    parser.add_argument("--lost", type=float, default=0.0, help="share of requests, and of answers, that the network loses")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> None:
    """Simulates, and prints the forecast. Raises: SettingsError: an argument or the file is wrong."""
    settings = _settings(args)
    fleet = Fleet(args.devices, _delays(args), args.dropout, args.away_seconds, args.gone, args.lost, args.seed)
    versions = simulate.run(settings, STAND_IN, fleet, _nothing)
    found = forecast(_told(versions, settings.versions), fleet.devices, settings.versions)
    if args.json:
        print(msgspec.json.encode(found).decode())
        return
    stale = found.staleness
    rows = {
        "devices": f"{found.devices:,}, {found.contributors:,} of them in a version",
        "versions": f"{found.versions:,} in {found.hours:.2f} hours",
        "versions an hour": f"{found.versions_per_hour:.1f}",
        "uploads": f"{found.uploads:,}",
        "staleness": f"median {stale.median}, 90 % {stale.p90}, 99 % {stale.p99}, most {stale.max} versions",
        "work wasted": f"{found.wasted:.1%}",
    }
    for name, value in rows.items():
        print(f"{name:<18}{value}")
    if found.versions < found.wanted:
        print(f"stands still at version {found.versions}: too few devices are left to fill a buffer of {settings.buffer_size}")


def forecast(versions: Iterator[Version], devices: int, wanted: int) -> Forecast:
    """Sums a run up."""
    stale, contributors = Counter[int](), set[int]()
    for version in versions:
        stale.update(version.staleness)
        contributors.update(device for device, _ in version.made_of)
        last = version
    hours = last.seconds / 3600
    return Forecast(
        devices,
        last.number,
        wanted,
        hours,
        last.number / hours if hours else 0.0,
        last.uploads,
        len(contributors),
        Staleness(*(percentile(stale, share) for share in (0.5, 0.9, 0.99, 1.0))),
        last.wasted,
    )


def percentile(counted: Counter[int], share: float) -> int:
    """The least value that at least `share` of all are not above; 0 of none."""
    seen, total = 0, counted.total()
    for value in sorted(counted):
        seen += counted[value]
        if seen >= share * total:
            return value
    return 0


def _settings(args: argparse.Namespace) -> LpFl:
    averaged = run_settings.load(args.config, args.system).averaged
    if averaged is None:
        raise SettingsError("what devices learn stays with them in this system: there is nothing to simulate; take lpfl")
    return msgspec.structs.replace(averaged, **_given(args, "versions", "buffer_size", "max_staleness", "concurrency"))


def _delays(args: argparse.Namespace) -> Delays:
    tiers, half_normal = _given(args, "means", "spread"), _given(args, "scale")
    if foreign := half_normal if args.delays == "tiers" else tiers:
        raise SettingsError(f"--{next(iter(foreign))} belongs to other delays than --delays {args.delays}; leave it out")
    if args.delays == "tiers":
        return msgspec.convert({**tiers, "communication": args.communication}, Tiers)
    return HalfNormal(**half_normal, communication=args.communication)


def _given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Those of these arguments that were given."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _told(versions: Iterator[Version], wanted: int) -> Iterator[Version]:
    """The same versions, and a progress line where somebody looks."""
    terminal = sys.stderr.isatty()
    for version in versions:
        if terminal:
            line = f"version {version.number} of {wanted}, {version.seconds / 3600:.2f} hours, {version.uploads:,} uploads"
            print(f"\r{line}", end="", file=sys.stderr, flush=True)
        yield version
    if terminal:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _nothing(_version: int, adapter: Arrays, _device: int, _rng: np.random.Generator) -> Learned:
    return Learned({name: np.zeros_like(array) for name, array in adapter.items()}, 1, {})
