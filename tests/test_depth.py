"""How many layers a device trains: the arithmetic, and what the choice comes to."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.adapters import AdapterSpec, Slot
from edge_sdk.bundle import CONFIG, FINAL, TOKENIZER, VOCABULARY, Bundle, File, Variant, layer_file
from edge_sdk.errors import DataError, SettingsError
from edge_sdk.protocol import PROTOCOL, Manifest
from edge_sdk.training import depth
from edge_sdk.training.depth import Limits, choose, cost
from tests import factories, strategies  # noqa: F401  # its hypothesis profile

LAYERS, WIDTH, WEIGHTS = 10, 100, 1_000_000
SLOTS = tuple(Slot(f"model.layers.{i}.self_attn.q_proj", WIDTH, WIDTH) for i in range(LAYERS))
FAST = 1e6


def bundle(layers_with_weights: int = LAYERS) -> Bundle:
    names = [CONFIG, FINAL, VOCABULARY, TOKENIZER]
    files = {name: File("0" * 64, 1000) for name in names} | {"model.int8.onnx": File("0" * 64, 1_000_000)}
    files |= {layer_file(i): File("0" * 64, 2 * WEIGHTS) for i in range(LAYERS - layers_with_weights, LAYERS)}
    variant = Variant("int8", "onnxruntime", "1.23", "model.int8.onnx", 1.0, 0.0)
    bare = factories.bundle("decoder", SLOTS)
    return msgspec.structs.replace(bare, layers=LAYERS, width=WIDTH, variants=(variant,), files=files, positions=512)


def manifest(min_layers: int = 2, min_rank: int = 0, layers_with_weights: int = LAYERS) -> Manifest:
    spec = AdapterSpec(SLOTS, 8, 16.0)
    return Manifest(
        PROTOCOL, "lpfl", factories.DECODER_TASK, spec, bundle(layers_with_weights), min_layers=min_layers, min_rank=min_rank
    )


def test_the_arithmetic_by_hand() -> None:
    """Three layers of a million weights and 200 tokens: 12 M operations a token, 14 M for the trunk, 200 bytes on disk."""
    found = cost(bundle(), "int8", 3, 200)

    assert (found.operations, found.trunk, found.cached) == (12_000_000, 14_000_000, 200)
    assert found.memory == depth.LIBRARIES + 12_000_000 + 4 * depth.ACTIVATIONS * WIDTH * 3 * 200


def test_every_layer_costs() -> None:
    """Memory and operations rise with k, the trunk falls, and answers need the vocabulary."""
    costs = [cost(bundle(), "int8", k, 200) for k in range(1, LAYERS + 1)]

    assert all(a.memory < b.memory and a.operations < b.operations and a.trunk > b.trunk for a, b in pairwise(costs))
    assert costs[-1].trunk == 0


def test_answers_cost_a_row_of_the_vocabulary_for_each_token() -> None:
    """50 words of width 100: 5,000 weights in float32, and two rows of 50 floats for each of 200 tokens."""
    vocabulary = {VOCABULARY: File("0" * 64, 2 * 5_000)}
    wordy = msgspec.structs.replace(bundle(), files=bundle().files | vocabulary)
    plain, found = cost(wordy, "int8", 3, 200), cost(wordy, "int8", 3, 200, answers=True)

    assert found.memory == plain.memory + 4 * 5_000 + 2 * 4 * 50 * 200
    assert found.operations == plain.operations + 4 * 5_000


def test_the_engine_counts_where_it_needs_more_than_training() -> None:
    """Texts are read before layers are trained; a big trunk under one layer is the peak."""
    big = msgspec.structs.replace(bundle(), files=bundle().files | {"model.int8.onnx": File("0" * 64, 100_000_000)})

    assert cost(big, "int8", 1, 200).memory == depth.LIBRARIES + 230_000_000 + 4 * depth.READING * WIDTH * 512


def test_without_a_choice_everything_is_trained() -> None:
    """A run that allows no choice gets none, however slow the device."""
    assert choose(manifest(min_layers=0), Limits(step_seconds=1e-9), "", 1e-9) == (LAYERS, 8)


@pytest.mark.parametrize(("min_layers", "layers"), [(0, 0), (2, 5)])
def test_memory_holds_where_there_is_no_choice_too(min_layers: int, layers: int) -> None:
    """A run of fixed depth, and layers named by the device, are refused where they do not fit."""
    needed = cost(bundle(), "int8", layers or LAYERS, 512).memory
    limits = Limits(layers=layers, memory_mb=needed // 10**6 + 1)

    assert choose(manifest(min_layers), limits, "", FAST)[0] == (layers or LAYERS)
    with pytest.raises(DataError, match=r"--memory-mb"):
        choose(manifest(min_layers), msgspec.structs.replace(limits, memory_mb=limits.memory_mb - 2), "", FAST)


def test_layers_without_weights_in_the_bundle_are_passed_over() -> None:
    """Where the bundle can train four layers, a choice of two to ten is four."""
    assert choose(manifest(2, layers_with_weights=4), Limits(), "", FAST) == (4, 8)


def test_a_device_may_say_how_many() -> None:
    """Layers and rank within the run's range are taken as they are said."""
    assert choose(manifest(2, 1), Limits(layers=3, rank=2), "", FAST) == (3, 2)


@pytest.mark.parametrize("limits", [Limits(layers=1), Limits(layers=11), Limits(rank=4), Limits(layers=3, rank=9)])
def test_a_choice_outside_the_run_is_refused(limits: Limits) -> None:
    """Fewer or more than the run allows is a DataError that says what it allows."""
    with pytest.raises(DataError, match="trains 2 to 10 layers at rank 8 to 8"):
        choose(manifest(), limits, "", FAST)


def test_with_room_and_speed_all_layers_are_trained() -> None:
    """Nothing stands in the way of the most."""
    assert choose(manifest(), Limits(), "", FAST) == (LAYERS, 8)


def test_memory_chooses_the_most_layers_that_fit() -> None:
    """The limit lies between the costs of five and of six layers: five."""
    limits = Limits(micro_tokens=200)
    between = (cost(bundle(), "int8", 5, 200).memory + cost(bundle(), "int8", 6, 200).memory) / 2e6

    assert choose(manifest(), msgspec.structs.replace(limits, memory_mb=round(between)), "", FAST) == (5, 8)


@given(st.integers(1, 2000), st.floats(0.1, 1000), st.integers(1, 600), st.integers(1, LAYERS))
def test_the_choice_is_the_most_that_fits(memory_mb: int, gflops: float, micro: int, fewest: int) -> None:
    """Whatever the limits: what is chosen fits, one layer more would not, and a refusal means the fewest do not fit."""
    limits = Limits(memory_mb=memory_mb, micro_tokens=micro)
    tokens = max(micro, factories.DECODER_TASK.max_tokens + 16)  # the longest text stands alone
    costs = {k: cost(bundle(), "int8", k, tokens) for k in range(1, LAYERS + 1)}
    room = {k: c.memory <= memory_mb * 1e6 for k, c in costs.items()}
    quick = {k: c.operations * tokens / (depth.EFFICIENCY * gflops * 1e9) <= limits.step_seconds for k, c in costs.items()}
    if not room[fewest]:
        with pytest.raises(DataError, match="--memory-mb"):
            choose(manifest(fewest), limits, "", gflops)
        return
    k, rank = choose(manifest(fewest), limits, "", gflops)

    assert fewest <= k <= LAYERS
    assert rank == 8
    assert room[k]
    assert quick[k] or k == fewest
    assert k == LAYERS or not (room[k + 1] and quick[k + 1])


def test_a_rank_is_kept_where_the_layers_are_chosen() -> None:
    """A device may name its rank and leave the layers to its limits; a rank below the run's is refused all the same."""
    assert choose(manifest(2, 2), Limits(rank=3), "", FAST) == (LAYERS, 3)
    with pytest.raises(DataError, match="at rank 2 to 8"):
        choose(manifest(2, 2), Limits(rank=1), "", FAST)


def test_longer_texts_leave_room_for_fewer_layers() -> None:
    """The longest text a task allows stands alone in memory, also where micro-batches are smaller."""
    found = []
    for max_tokens in (16, 256, 480):
        task = msgspec.structs.replace(factories.DECODER_TASK, max_tokens=max_tokens)
        run = msgspec.structs.replace(manifest(1), task=task)
        found.append(choose(run, Limits(memory_mb=587, micro_tokens=1), "", FAST)[0])

    assert found == [6, 4, 3]  # 27 MB for k (4 + 0.0096 * tokens) MB, of 32, 272 and 496 tokens


def test_too_little_memory_says_how_much_it_takes() -> None:
    """Where not even the fewest layers fit, the error names the need, the limit and the options that help."""
    with pytest.raises(DataError, match=r"2 layers.*takes about \d+ MB.*allows 100 \(--memory-mb\).*--micro-tokens"):
        choose(manifest(), Limits(memory_mb=100), "", FAST)


def test_a_slow_device_takes_fewer_layers_but_never_too_few() -> None:
    """A micro-batch must fit into a step: 4 M operations a layer and token, 200 tokens; at least two layers."""
    limits = Limits(micro_tokens=200, step_seconds=1.0)
    gflops_for_five = 5 * 4e6 * 200 / depth.EFFICIENCY / 1e9 * 1.01

    assert choose(manifest(), limits, "", gflops_for_five) == (5, 8)
    assert choose(manifest(), limits, "", 1e-9) == (2, 8)


def test_a_bundle_without_the_weights_says_so() -> None:
    """A run whose depth the bundle cannot serve is an error before anything is downloaded."""
    with pytest.raises(DataError, match=r"holds no layer\.000\.safetensors"):
        choose(manifest(min_layers=0, layers_with_weights=4), Limits(), "", FAST)


@pytest.mark.parametrize(
    "change",
    [{"layers": -1}, {"rank": -1}, {"memory_mb": -1}, {"cache_mb": -1}, {"micro_tokens": 0}, {"step_seconds": 0.0}],
)
def test_limits_out_of_bounds_are_refused(change: dict[str, Any]) -> None:
    """Each bound is checked when limits are made."""
    with pytest.raises(SettingsError):
        Limits(**change)
