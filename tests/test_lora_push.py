"""The bench of the server's costs: tiny runs against a real server, what voids a run, peers, and the summary."""

from __future__ import annotations

import json
import math
from typing import Any, get_args

import numpy as np
import pytest

from bench import __main__ as bench
from bench import lora_push, pushing
from bench.lora_push import Cell
from bench.pushing import Bytes
from edge_sdk.codec import Encoding
from edge_sdk.errors import DataError

PEER = {
    "system": "flwr 1.41.0",
    "nodes": 4,
    "rounds": 5,
    "flat": True,
    "database": False,
    "median_seconds_per_round": 7.25,
    "seconds_per_round": [7.5, 7.25, 7.0],
    "max_abs_error": 2e-9,
    "server_cpu_seconds_per_update": 3.2,
    "server_peak_mb": 900,
    "load": 1.5,
}


def row(tier: str, **changed: Any) -> dict[str, Any]:
    """Of 4 clients in synchronous rounds, which cost 0.125 s."""
    cell = {"system": "tandem-edge", "mode": "sync", "tier": tier, "clients": 4, "buffer": 4, "flat": False, "rounds": 10}
    costs = {"seconds_per_round": 0.125, "server_cpu_seconds_per_update": 0.015, "server_peak_mb": 120.0, "max_abs_error": 0.0}
    return {**cell, "encoding": "fp32", "counted": False, **costs, **changed}


def rows() -> list[dict[str, Any]]:
    """As a whole bench has them, with others among them that the summary must leave out."""
    crowd = {"mode": "crowd", "in_flight_mb": 140.0, "updates_per_second": 39.0, "peak_mb": {"2": 90.0}}
    return [
        row("bare", clients=8, buffer=8, seconds_per_round=9.0),
        row("bare", seconds_per_round=0.0625),
        row("production", flat=True, seconds_per_round=9.0),
        row("production"),
        row("production", mode="async", buffer=2, seconds_per_round=9.0),
        row("production", counted=True, seconds_per_round=9.0, up_ratio=1.01, down_ratio=1.02),
        row("production", counted=True, seconds_per_round=9.0, encoding="int8", up_ratio=0.26, down_ratio=1.02),
        row("bare", **crowd),
        row("production", **{**crowd, "in_flight_mb": 145.0}),
    ]


# Real servers ---------------------------------------------------------------------------------------------------------
def test_a_run_in_production_is_measured_from_end_to_end() -> None:
    """Two processes, three versions of 96 tensors, all bytes counted; the bench itself has looked at the adapter."""
    found = lora_push.measure(Cell("production", 2, 2, rounds=2, counted=True))

    assert (found["mode"], found["tier"], found["clients"], found["flat"]) == ("sync", "production", 2, False)
    assert 0 < found["max_abs_error"] <= lora_push.TOLERANCE
    assert found["seconds_per_round"] > 0
    assert found["server_cpu_seconds_per_update"] > 0
    assert found["server_peak_mb"] > 20
    assert 1 < found["up_ratio"] < 1.02
    assert 1 < found["down_ratio"] < 1.02


def test_one_tensor_in_int8_without_waiting_for_everybody() -> None:
    """The adapter is where it should be all the same: error feedback makes up for what int8 loses."""
    found = lora_push.measure(Cell("bare", 2, 1, flat=True, encoding="int8", rounds=2))

    assert found["mode"] == "async"
    assert found["max_abs_error"] <= lora_push.TOLERANCE + lora_push.OWED


def test_a_crowd_is_taken_in_halves_and_at_once() -> None:
    """Every update of every stage and wave is acknowledged, or the bench would have failed."""
    found = lora_push.measure_crowd("bare", stages=(2, 4))

    assert list(found["peak_mb"]) == ["2", "4"]
    assert 20 < found["peak_mb"]["2"] <= found["peak_mb"]["4"] <= found["in_flight_mb"] <= found["server_peak_mb"]
    assert found["updates_per_second"] > 0
    assert 0 < found["max_abs_error"] <= lora_push.TOLERANCE


def test_a_crowd_whose_adapter_is_elsewhere_is_void(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its speed and memory are those of a server that averages rightly, or they are not told."""
    monkeypatch.setattr(pushing, "STEP", 2e-3)  # what devices have learned
    with pytest.raises(RuntimeError, match=r"void: .* max_abs_error 0\.00[56]: .*'mode': 'crowd'"):
        lora_push.measure_crowd("bare", stages=(2, 4))


# What is made of it ---------------------------------------------------------------------------------------------------
def test_the_payload_is_that_of_the_peer() -> None:
    """LoRA of rank 8 on q and v in 24 layers; flat, the same numbers in one tensor."""
    shapes, flat = lora_push.TENSORS.update_shapes(), lora_push.FLAT.update_shapes()

    assert len(shapes) == 96
    assert {shape for shape in shapes.values()} == {(8, 896), (896, 8), (128, 8)}
    assert lora_push.NUMBERS == 540_672
    assert list(flat.values()) == [(540_672, 1)]


def test_the_error_is_the_farthest_number() -> None:
    """Of the arrays that are trained, from start + versions * 1e-3."""
    start = {"a": np.zeros(2, np.float32), "b": np.ones(3, np.float32)}
    final = {"a": np.array([0.003, 0.25], np.float32), "b": np.ones(3, np.float32)}

    assert lora_push.max_abs_error(start, final, ["a"], 3) == pytest.approx(0.247)
    assert lora_push.max_abs_error(start, final, ["b"], 3) == pytest.approx(0.003)
    assert math.isnan(lora_push.max_abs_error(start, {**final, "b": np.full(3, np.nan, np.float32)}, ["a", "b"], 3))


@pytest.mark.parametrize("error", [5e-6, math.inf, math.nan])
def test_a_run_whose_adapter_is_elsewhere_is_void(error: float) -> None:
    """In every encoding."""
    for encoding in get_args(Encoding):
        with pytest.raises(RuntimeError, match=r"void: .* max_abs_error .*: a run"):
            lora_push.check(error, encoding, "a run")


def test_int8_may_owe_half_a_scale_of_its_last_update() -> None:
    """1e-3 / 254 = 3.94e-6, besides what float32 may be off by; float32 and float16 owe nothing."""
    lora_push.check(1e-6, "fp32", "")
    lora_push.check(4.9e-6, "int8", "")

    beyond: list[tuple[float, Encoding]] = [(1.1e-6, "fp32"), (1.1e-6, "fp16"), (5e-6, "int8")]
    for error, encoding in beyond:
        with pytest.raises(RuntimeError, match="void"):
            lora_push.check(error, encoding, "")


def test_bytes_are_told_as_multiples_of_bare_float32() -> None:
    """Two devices, three versions: three updates up and four adapters down for each."""
    counted = [Bytes(3 * lora_push.IDEAL, 8 * lora_push.IDEAL), Bytes(6 * lora_push.IDEAL, 0)]

    assert lora_push.bytes_ratios(counted, 3) == {"up_ratio": 1.5, "down_ratio": 1.0}


def test_the_summary_is_of_four_clients_in_rounds() -> None:
    """Exactly the keys of the issue; rows of other sizes, and those that a relay slowed, count for nothing else."""
    costs = {"seconds_per_round": 0.125, "server_cpu_seconds_per_update": 0.015, "server_peak_mb": 120.0}

    assert lora_push.summary(rows()) == {
        "bare": {**costs, "seconds_per_round": 0.0625},
        "production": costs,
        "in_flight_64_mb": 145.0,
        "updates_per_second": 39.0,
        "bytes_ratio_fp32": 1.01,
        "bytes_ratio_int8": 0.26,
    }


def test_a_missed_target_is_said_so() -> None:
    """39 updates/s are too few, and all else is kept."""
    told = lora_push.targets(lora_push.summary(rows()))

    assert [line.split(" ")[0] for line in told if line.endswith("MISSED")] == ["updates_per_second"]
    assert sum(line.endswith("kept") for line in told) == 5


def test_the_bench_has_every_row_that_its_summary_needs() -> None:
    """Each of the cells once, and 4 clients with and without counting."""
    cells = lora_push.cells(10)
    four = [(c.tier, c.encoding, c.counted) for c in cells if c.sync and c.clients == 4 and not c.flat]

    assert len(set(cells)) == len(cells)
    assert ("bare", "fp32", False) in four
    assert [each for each in four if each[0] == "production"] == [
        ("production", "fp32", False),
        ("production", "fp32", True),
        ("production", "int8", True),
    ]


# Peers ----------------------------------------------------------------------------------------------------------------
def test_a_peer_has_its_line_in_the_same_table() -> None:
    """Beside ours, with its median; the summary does not change."""
    others = lora_push.peer_rows(json.dumps(PEER).encode() + b"\n")
    merged = lora_push.result(rows(), others)

    assert merged.rows[-1] == {
        "system": "flwr 1.41.0",
        "mode": "sync",
        "tier": "bare",
        "clients": 4,
        "buffer": 4,
        "flat": True,
        "encoding": "fp32",
        "rounds": 5,
        "seconds_per_round": 7.25,
        "server_cpu_seconds_per_update": 3.2,
        "server_peak_mb": 900.0,
        "max_abs_error": 2e-9,
    }
    assert merged.summary == lora_push.summary(rows())
    assert merged.table.row_count == len(rows()) - 2 + 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (json.dumps({**PEER, "max_abs_error": 0.001}), "is void"),
        ("[]", "a line of JSON a run"),
        ('{"system": 3}', "a line of JSON"),
    ],
)
def test_a_peer_that_is_void_or_none_is_refused(line: str, said: str) -> None:
    """Before anything is measured."""
    with pytest.raises(DataError, match=said):
        lora_push.peer_rows(line.encode())


def test_only_this_bench_has_peers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Another bench would not know what to do with them."""
    monkeypatch.setattr("sys.argv", ["bench", "secure", "--peer", "line.json"])
    with pytest.raises(SystemExit, match="2"):
        bench.main()

    assert "--peer is for lora_push" in capsys.readouterr().err
