"""Looks at the device: battery, heat, load and memory as Linux tells them, and how fast its cores multiply."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import time
from pathlib import Path

import numpy as np

from edge_sdk.eligibility import Conditions

SYS = Path("/sys/class")
PROC = Path("/proc")


def look(sys: Path = SYS, proc: Path = PROC) -> Conditions:
    """What can be read here; on other systems than Linux that is little."""
    supplies = [folder for folder in sorted(sys.glob("power_supply/*")) if _texts(folder, "scope") != ["Device"]]  # no mouse
    charge = [value / 100 for folder in supplies for value in _numbers(folder, "capacity")]
    online = [value for folder in supplies for value in _numbers(folder, "online")]
    states = [text for folder in supplies for text in _texts(folder, "status")]
    heat = [value / 1000 for value in _numbers(sys / "thermal", "thermal_zone*/temp")]
    load = None
    with contextlib.suppress(OSError):
        load = os.getloadavg()[0] / (os.cpu_count() or 1)
    return Conditions(
        battery=min(charge) if charge else None,
        charging=any(online) or "Charging" in states or "Full" in states if charge else None,
        celsius=max(heat) if heat else None,
        load=load,
        free_mb=_free(proc / "meminfo"),
    )


def gflops(threads: int = 1, seconds: float = 0.02, samples: int = 5) -> float:
    """Billions of float32 operations a second in matrix products of a layer's size, on `threads` of the cores.

    numpy takes every core it has; the best of some samples is what the device can do, the others what stood in its way.
    """
    a, b = np.ones((256, 512), np.float32), np.ones((512, 512), np.float32)
    a @ b
    best = 0.0
    for _ in range(samples):
        began, done = time.perf_counter(), 0
        while not done or time.perf_counter() - began < seconds:  # never 0, which nobody could divide by
            a @ b
            done += 1
        best = max(best, done * 2 * 256 * 512 * 512 / (time.perf_counter() - began) / 1e9)
    cores = os.cpu_count() or 1
    return best * min(threads, cores) / cores


def trim() -> None:
    """Gives memory that is free inside this process back to the system, where the C library can."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def share_heap() -> None:
    """Lets threads that start later take their memory from one heap, where the C library can: what one frees another takes."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(-8, 1)  # M_ARENA_MAX, of glibc's malloc.h


def _free(meminfo: Path) -> float | None:
    for text in _texts(meminfo.parent, meminfo.name):
        for line in text.splitlines():
            if line.startswith("MemAvailable:"):
                with contextlib.suppress(ValueError, IndexError):
                    return int(line.split()[1]) / 1024
    return None


def _texts(folder: Path, pattern: str) -> list[str]:
    found = []
    for path in sorted(folder.glob(pattern)):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            found.append(path.read_text().strip())
    return found


def _numbers(folder: Path, pattern: str) -> list[float]:
    numbers = []
    for text in _texts(folder, pattern):
        with contextlib.suppress(ValueError):
            numbers.append(float(text))
    return numbers
