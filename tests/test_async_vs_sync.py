"""The bench of asynchronous averaging on a task made up here: learning, when a target counts as reached, what is summed up."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch

from bench import async_vs_sync
from bench.async_vs_sync import SPEC, Cell, Learning, Point, Texts
from edge_sdk.training.batches import Training

A, B = SPEC.slots[0].a, SPEC.slots[0].b


def texts(count: int, seed: int) -> Texts:
    """Unit vectors whose class is the sign of their first number."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, 384))
    x[:, 0] *= 20
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return Texts(x.astype(np.float32), (x[:, 0] > 0).astype(np.int64))


def task(devices: int = 12) -> Learning:
    return Learning(tuple(texts(16, 100 + k) for k in range(devices)), texts(200, 1), texts(200, 2))


def row(
    mode: str, seed: int, seconds: float, uploads: int, delays: str = "three_tier", reached: bool = True
) -> dict[str, object]:
    place = {"delays": delays, "mode": mode, "seed": seed, "rates": (0.01, 2.0)}
    return {**place, "seconds": seconds, "uploads": uploads, "reached": reached, "best": 0.8}


def test_a_step_is_adams() -> None:
    """Three steps on one example a batch give what torch's Adam gives on the same loss."""
    start = {A: SPEC.start(3)[A], B: np.random.default_rng(0).normal(0, 0.1, (2, 8)).astype(np.float32)}
    one = texts(1, 0)
    found, loss = async_vs_sync.fit(start, one, Training(steps=3, batch_size=1, learning_rate=0.01), np.random.default_rng(0))

    a, b = (torch.tensor(start[name], requires_grad=True) for name in (A, B))
    optimizer, losses = torch.optim.Adam([a, b], lr=0.01), []
    for _ in range(3):
        optimizer.zero_grad()
        score = SPEC.scaling * torch.tensor(one.x) @ a.T @ b.T
        losses.append(torch.nn.functional.cross_entropy(score, torch.tensor(one.y)))
        losses[-1].backward()  # type: ignore[no-untyped-call]  # torch has no annotation here
        optimizer.step()
    assert loss == pytest.approx(float(torch.stack(losses).mean().detach()), rel=1e-5)
    np.testing.assert_allclose(found[A], a.detach().numpy(), atol=2e-6)
    np.testing.assert_allclose(found[B], b.detach().numpy(), atol=2e-6)
    assert (start[B] != found[B]).any()


def test_the_modes_differ_only_in_what_makes_a_version() -> None:
    """A round is all devices, a buffer is ten updates; everything else is the same."""
    sync, buffered = (async_vs_sync.settings_of(mode, (0.01, 2.0), 5, 40) for mode in async_vs_sync.MODES)

    assert (sync.buffer_size, buffered.buffer_size) == (40, 10)
    assert msgspec.structs.replace(sync, buffer_size=10) == buffered
    assert (buffered.training.learning_rate, buffered.server_lr, buffered.seed) == (0.01, 2.0, 5)


@pytest.mark.parametrize("mode", async_vs_sync.MODES)
def test_both_modes_learn_and_stop_on_target(mode: async_vs_sync.Mode) -> None:
    """From half to nine in ten; a curve ends soon after the target is reached for good."""
    cell = Cell("three_tier", mode, 0, (0.01, 2.0), 0.9)
    points = async_vs_sync.curve(cell, task())
    at = async_vs_sync.reached(points, 0.9)

    assert points[0].seconds == points[0].uploads == 0
    assert points[0].accuracy < 0.7
    assert at is not None
    assert points[-1].seconds < at.seconds + 2 * async_vs_sync.HOLD + 100
    if mode == "sync":
        assert {point.uploads % 12 for point in points} == {0}
    assert async_vs_sync.curve(cell, task()) == points


def test_a_lucky_version_is_not_the_target() -> None:
    """On target once, then below it on average for 420 s: the first point that is followed by good ones counts."""
    accuracies = {0: 0.5, 20: 0.875, 40: 0.5, 460: 0.75, 480: 0.625, 500: 0.875}
    points = [Point(seconds, 0, accuracy) for seconds, accuracy in accuracies.items()]

    assert async_vs_sync.reached(points, 0.75) == points[3]
    assert async_vs_sync.reached(points, 0.9) is None
    assert async_vs_sync.reached([Point(0, 0, 0.9), Point(421, 1, 0.1)], 0.9) == Point(0, 0, 0.9)


def test_ratios_are_means_within_a_seed() -> None:
    """Twice and four times as fast is three times; uploads are async's over sync's, under three tiers."""
    rows = [row("sync", 0, 800, 100), row("async", 0, 400, 50), row("sync", 1, 800, 100), row("async", 1, 200, 150)]
    rows += [row("sync", s, 900, 7, "half_normal") for s in (0, 1)] + [row("async", s, 300, 9, "half_normal") for s in (0, 1)]
    found = async_vs_sync.ratios(rows)

    means = {"three_tier_speedup": 3, "half_normal_speedup": 3, "upload_ratio": 1}
    spreads = {"three_tier_speedup_std": 2**0.5, "half_normal_speedup_std": 0, "upload_ratio_std": 0.5**0.5}
    assert found == pytest.approx(means | spreads)


def test_rates_that_reach_the_target_soonest_win() -> None:
    """Time first; where nothing reaches it, the best accuracy."""
    fast, slow, never = row("sync", 0, 5, 1), row("sync", 0, 9, 1), row("sync", 0, 1, 1, reached=False)
    never["rates"], slow["rates"] = (0.5, 1.0), (0.25, 1.0)

    assert async_vs_sync.best_rates([slow, never, fast]) == (0.01, 2.0)
    assert async_vs_sync.best_rates([never, {**never, "rates": (0.125, 4.0), "best": 0.9}]) == (0.125, 4.0)


def test_the_table_has_a_line_for_each_mode() -> None:
    """As docs may show it: hours and uploads with their spread."""
    rows = [
        row(mode, seed, 3600 * (1 + seed), 1000, delays)
        for delays in async_vs_sync.DELAYS
        for mode in ("sync", "async")
        for seed in (0, 2)
    ]
    lines = async_vs_sync.markdown(rows).splitlines()

    assert len(lines) == 6
    assert lines[2] == "| three tier | sync | 0.01, 2 | 2.00 ±1.41 | 1,000 ±0 | 0.800 |"
    assert [line.split(" | ")[1] for line in lines[2:]] == ["sync", "async", "sync", "async"]
