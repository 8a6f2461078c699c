"""Adapters as named arrays: shapes, start values, arithmetic, and the PEFT directory."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch

from edge_sdk import adapters
from edge_sdk.adapters import AdapterSpec, Array, Arrays, Slot, mismatch, read_peft, weighted_mean
from edge_sdk.errors import DataError
from tests import factories, strategies

SPEC = factories.SPEC
SHAPES = SPEC.shapes()
FIRST, LAST = SPEC.slots[0], SPEC.slots[-1]
SMALL = {"x": (3,), "y": (1, 2)}  # arithmetic cares for no names

Weighted = list[tuple[Arrays, float]]


def one(*values: float) -> dict[str, Array]:
    return {"x": np.array(values, np.float32)}


def weighted(elements: st.SearchStrategy[dict[str, Array]], max_size: int = 6) -> st.SearchStrategy[Weighted]:
    """Arrays with whole positive weights."""
    items: st.SearchStrategy[tuple[Arrays, float]] = st.tuples(elements, st.integers(1, 100).map(float))
    return st.lists(items, min_size=1, max_size=max_size)


def change_config(folder: Path, **fields: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture
def peft(tmp_path: Path) -> Path:
    """A good PEFT directory of `SPEC`."""
    factories.write_peft(tmp_path, SPEC.start(3), SPEC, "base")
    return tmp_path


# Spec -----------------------------------------------------------------------------------------------------------------
def test_names_and_shapes_are_peft_s() -> None:
    """A is (rank, in), B is (out, rank), under the names PEFT gives them."""
    spec = AdapterSpec((Slot("layer.0.query", in_features=6, out_features=4),), rank=2, alpha=8.0)

    assert spec.shapes() == {
        "base_model.model.layer.0.query.lora_A.weight": (2, 6),
        "base_model.model.layer.0.query.lora_B.weight": (4, 2),
    }
    assert spec.scaling == 4.0


@given(st.integers(0, 2**32))
def test_the_start_changes_nothing_and_is_within_its_bound(seed: int) -> None:
    """B is exactly zero, so B A x is zero; A is uniform in ±1/sqrt(in) and not zero, so it can learn."""
    arrays = SPEC.start(seed)

    assert adapters.shapes_of(arrays) == SHAPES
    for slot in SPEC.slots:
        assert not arrays[slot.b].any()
        assert np.abs(arrays[slot.a]).max() <= np.float32(1 / math.sqrt(slot.in_features))
        assert arrays[slot.a].any()
        assert arrays[slot.a].dtype == arrays[slot.b].dtype == np.float32


def test_the_start_fills_its_bound() -> None:
    """A is spread over the whole interval: of 40,000 values the mean is near 0 and the extremes near the bound."""
    spec = AdapterSpec((Slot("big", 100, 1),), rank=400, alpha=1.0)
    values = spec.start(0)[spec.slots[0].a]

    assert abs(float(values.mean())) < 0.002
    assert 0.0999 < float(values.max()) <= 0.1
    assert -0.1 <= float(values.min()) < -0.0999


def test_the_start_is_seeded() -> None:
    """One seed is one adapter, another seed another; the slots of one adapter differ among themselves."""
    assert strategies.same(SPEC.start(1), SPEC.start(1))
    assert not strategies.same(SPEC.start(1), SPEC.start(2))
    assert (SPEC.start(1)[FIRST.a] != SPEC.start(1)[LAST.a]).any()


# Parts ----------------------------------------------------------------------------------------------------------------
DEEP = AdapterSpec(tuple(Slot(f"layer.{i}.{name}", 5, 3) for i in (2, 3, 4) for name in ("key", "value")), rank=3, alpha=6.0)
depths, ranks = st.integers(1, 3), st.integers(1, 3)


def test_what_is_trained_is_all_or_with_a_frozen_b_alone() -> None:
    """`update_shapes` is `shapes`, or their B half where A stays at home."""
    spec = AdapterSpec((Slot("layer.0.query", 6, 4),), rank=2, alpha=8.0)
    frozen = AdapterSpec(spec.slots, 2, 8.0, freeze_a=True)

    assert spec.update_shapes() == spec.shapes() == frozen.shapes()
    assert frozen.update_shapes() == {"base_model.model.layer.0.query.lora_B.weight": (4, 2)}
    assert frozen.part(1, 1).update_shapes() == {"base_model.model.layer.0.query.lora_B.weight": (4, 1)}


def test_depth_is_counted_from_the_lowest_layer_with_a_slot() -> None:
    """Layers 2 to 4 are three; a layer without slots in between counts, a module without a number is one layer, none is none."""
    assert DEEP.depth == 3
    assert AdapterSpec((Slot("layer.9.query", 1, 1), Slot("layer.10.query", 1, 1)), 1, 1.0).depth == 2
    assert AdapterSpec((Slot("layer.1.query", 1, 1), Slot("layer.5.query", 1, 1)), 1, 1.0).depth == 5
    assert AdapterSpec((Slot("head", 1, 1),), 1, 1.0).depth == 1
    assert AdapterSpec((), 1, 1.0).depth == 0


def test_an_adapter_without_slots_has_no_part() -> None:
    """A manifest that names no slot is refused in one sentence by a device that would train it."""
    with pytest.raises(DataError, match="an adapter of 0 layers"):
        factories.manifest(AdapterSpec((), 2, 4.0)).part(0, 0)


@given(depths, ranks, st.data())
def test_a_part_of_a_part_is_a_part(layers: int, rank: int, data: st.DataObject) -> None:
    """Parts are nested, and so is what is taken for them; the scale alpha / rank is that of the whole."""
    fewer, lower = data.draw(st.integers(1, layers)), data.draw(st.integers(1, rank))
    part, smaller = DEEP.part(layers, rank), DEEP.part(fewer, lower)
    arrays = DEEP.start(1) | {slot.b: np.full((3, 3), slot.layer, np.float32) for slot in DEEP.slots}

    assert part.part(fewer, lower).slots == smaller.slots
    assert smaller.scaling == pytest.approx(DEEP.scaling)
    assert adapters.shapes_of(adapters.take(arrays, part)) == part.shapes()
    assert strategies.same(adapters.take(adapters.take(arrays, part), smaller), adapters.take(arrays, smaller))
    assert strategies.same(adapters.take(arrays, DEEP), arrays)


@given(st.integers(1, 2))
def test_a_part_and_what_is_below_it_are_the_whole(layers: int) -> None:
    """At full rank no slot is in both and none is lost, bit for bit."""
    arrays = {name: array + np.float32(1) for name, array in DEEP.start(1).items()}
    part = DEEP.part(layers, 3)
    lower = adapters.below(arrays, DEEP, min(slot.layer for slot in part.slots))

    assert lower is not None
    assert not set(lower.spec.slots) & set(part.slots)
    assert lower.spec.scaling == DEEP.scaling
    assert strategies.same({**lower.arrays, **adapters.take(arrays, part)}, arrays)


@given(depths, ranks, st.integers(0, 2**32))
def test_adding_a_part_moves_nothing_else(layers: int, rank: int, seed: int) -> None:
    """The delta of a part lands in its first components; beyond its rank and below its layers every bit stays."""
    whole, part = DEEP.start(0), DEEP.part(layers, rank)
    delta = part.start(seed)
    found = adapters.add(whole, delta)

    assert adapters.shapes_of(found) == DEEP.shapes()
    for name, array in delta.items():
        size = tuple(slice(n) for n in array.shape)
        assert (found[name][size] == whole[name][size] + array).all()
        beyond = np.ones(whole[name].shape, bool)
        beyond[size] = False
        assert (found[name][beyond] == whole[name][beyond]).all()
    assert all((found[name] == array).all() for name, array in whole.items() if name not in delta)


def test_a_mean_of_different_shapes_by_hand() -> None:
    """(1 * (8) + 3 * (4, 2)) / 4 = (5, 1.5): zero beyond its end; a name of one item alone is that item's."""
    found = weighted_mean([(one(8), 1.0), (one(4, 2) | {"y": np.full(1, 9, np.float32)}, 3.0)])

    assert (found["x"].tolist(), found["y"].tolist()) == ([5.0, 1.5], [9.0])


# Comparing ------------------------------------------------------------------------------------------------------------
def test_no_difference_is_none() -> None:
    """Equal names and shapes are no mismatch, in any order."""
    assert mismatch(dict(reversed(SHAPES.items())), SHAPES) is None


def test_differences_are_said_in_one_sentence() -> None:
    """Missing and unexpected names are counted and the first of each is named; then comes the first wrong shape."""
    found = {name: shape for name, shape in SHAPES.items() if name != FIRST.a} | {"x": (1,), "y": (1,)}

    assert mismatch(found, SHAPES) == (
        f"tensor names differ from the base model's adapter slots: 1 missing (first: {FIRST.a}), 2 unexpected (first: x)"
    )
    assert mismatch({"x": (1, 2), "y": (3,)}, {"x": (1, 2), "y": (4,)}) == "y has shape (3,), expected (4,)"
    assert mismatch({}, {"x": (1,)}) == "tensor names differ from the base model's adapter slots: 1 missing (first: x)"
    assert mismatch({"x": (1,)}, {}) == "tensor names differ from the base model's adapter slots: 1 unexpected (first: x)"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_array_that_is_not_finite_is_named(value: float) -> None:
    """The first array with NaN or infinity is named; finite arrays, however large, are fine."""
    assert adapters.not_finite({**one(3e38), "y": np.array([1, value], np.float32)}) == "y"
    assert adapters.not_finite(one(3e38, -3e38)) is None


# Arithmetic -----------------------------------------------------------------------------------------------------------
@given(strategies.whole_adapters(SMALL), strategies.whole_adapters(SMALL))
def test_what_is_subtracted_can_be_added(a: dict[str, Array], b: dict[str, Array]) -> None:
    """start + (trained - start) is trained, exactly where numbers are exact."""
    assert strategies.same(adapters.add(b, adapters.subtract(a, b)), a)


def test_add_scales_its_second_part() -> None:
    """a + scale * b: (1, 2) + 0.5 * (4, -8) = (3, -2), in float32."""
    found = adapters.add(one(1, 2), one(4, -8), scale=0.5)

    assert found["x"].tolist() == [3.0, -2.0]
    assert found["x"].dtype == np.float32


def test_the_mean_of_known_arrays() -> None:
    """(1 * (2, 0) + 3 * (6, -4)) / 4 = (5, -3), in float32."""
    found = weighted_mean([(one(2, 0), 1.0), (one(6, -4), 3.0)])

    assert found["x"].tolist() == [5.0, -3.0]
    assert found["x"].dtype == np.float32


@given(weighted(strategies.whole_adapters(SMALL)), st.randoms(use_true_random=False))
def test_the_order_of_updates_does_not_matter(items: Weighted, random: Any) -> None:
    """The mean is the same, bit for bit, whichever update comes first."""
    assert strategies.same(weighted_mean(random.sample(items, len(items))), weighted_mean(items))


@given(strategies.adapters(SMALL), st.floats(0.1, 1000), st.integers(1, 5))
def test_the_mean_of_equals_is_the_same(arrays: dict[str, Array], weight: float, count: int) -> None:
    """Updates that agree are not changed by averaging, whatever they weigh."""
    found = weighted_mean([(arrays, weight)] * count)

    for name, array in arrays.items():
        np.testing.assert_allclose(found[name], array, rtol=2e-7)


@given(weighted(strategies.whole_adapters(SMALL)), weighted(strategies.whole_adapters(SMALL)))
def test_a_mean_of_means_is_the_mean(left: Weighted, right: Weighted) -> None:
    """Updates averaged in two groups, each group weighing the sum of its weights, give the mean of all of them."""
    parts = [(weighted_mean(group), sum(weight for _, weight in group)) for group in (left, right)]
    whole, split = weighted_mean([*left, *right]), weighted_mean(parts)

    for name in SMALL:
        np.testing.assert_allclose(split[name], whole[name], rtol=1e-6, atol=1e-3)  # values reach 1000, float32 has 7 digits


@given(weighted(strategies.whole_adapters(SMALL)), st.sampled_from([0.5, 2.0, 1024.0]))
def test_only_the_ratio_of_weights_counts(items: Weighted, factor: float) -> None:
    """All weights times the same factor give the same mean."""
    assert strategies.same(weighted_mean([(arrays, weight * factor) for arrays, weight in items]), weighted_mean(items))


def test_the_sum_is_kept_in_double_precision() -> None:
    """A thousand small values beside a large one are not lost: (2^24 + 1000 * 1) / 1001 in float32 arithmetic would drop them."""
    items = [(one(2.0**24), 1.0), *[(one(1.0), 1.0)] * 1000]

    assert weighted_mean(items)["x"][0] == np.float32((2**24 + 1000) / 1001)
    assert np.float32(2.0**24) + np.float32(1) == np.float32(2.0**24)


def test_a_weight_of_zero_counts_nothing() -> None:
    """An update that weighs nothing changes nothing."""
    assert weighted_mean([(one(4), 2.0), (one(1000), 0.0)])["x"].tolist() == [4.0]


@pytest.mark.parametrize("items", [[], [(one(1), 0.0)], [(one(1), 0.0), (one(2), 0.0)], [(one(1), -1.0)]])
def test_no_weight_is_no_mean(items: Weighted) -> None:
    """Without a positive sum of weights there is nothing to divide by, and that is said."""
    with pytest.raises(DataError, match="weights sum to zero"):
        weighted_mean(items)


def test_inputs_stay_as_they_are() -> None:
    """Averaging and adding never write into what they are given."""
    a, b = one(1, 2), one(3, 4)
    weighted_mean([(a, 1.0), (b, 2.0)])
    adapters.add(a, b)
    adapters.subtract(a, b)

    assert (a["x"].tolist(), b["x"].tolist()) == ([1.0, 2.0], [3.0, 4.0])


# PEFT directory -------------------------------------------------------------------------------------------------------
@given(arrays=strategies.adapters(SHAPES))
def test_a_folder_comes_back_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, arrays: dict[str, Array]) -> None:
    """read_peft is the inverse of what makes one, in any memory layout."""
    folder = tmp_path_factory.mktemp("peft")
    factories.write_peft(folder, {name: np.asfortranarray(array) for name, array in arrays.items()}, SPEC, "base")
    found, spec = read_peft(folder, SPEC.slots)

    assert strategies.same(found, arrays)
    assert spec == SPEC


def test_slots_an_adapter_leaves_empty_are_fine(peft: Path) -> None:
    """An adapter may fill some of a base's slots; its spec names those and no others."""
    more = (*SPEC.slots, Slot("layer.2.query", 6, 4))

    assert read_peft(peft, more)[1].slots == SPEC.slots


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", "IA3"),
        ("bias", "lora_only"),
        ("use_dora", True),
        ("use_rslora", True),
        ("rank_pattern", {"query": 4}),
        ("alpha_pattern", {"query": 4}),
    ],
)
def test_what_is_not_plain_lora_is_refused(peft: Path, field: str, value: object) -> None:
    """Variants that compute something else than W x + (alpha / rank) B A x are refused by name."""
    change_config(peft, **{field: value})

    with pytest.raises(DataError, match=f"only plain LoRA \\({field}="):
        read_peft(peft, SPEC.slots)


@pytest.mark.parametrize(
    ("slots", "sentence"),
    [
        ((Slot("layer.0.query", 6, 5), LAST), r"lora_B.weight has shape \(4, 2\), expected \(5, 2\)"),
        ((Slot("layer.0.query", 7, 4), LAST), r"lora_A.weight has shape \(2, 6\), expected \(2, 7\)"),
        ((FIRST,), "2 unexpected"),
        ((), "4 unexpected"),
    ],
)
def test_an_adapter_of_another_base_is_refused(peft: Path, slots: tuple[Slot, ...], sentence: str) -> None:
    """Layers the base does not have, or has in another size, are refused in one sentence."""
    with pytest.raises(DataError, match=sentence):
        read_peft(peft, slots)


def test_a_rank_the_arrays_do_not_have_is_refused(peft: Path) -> None:
    """The rank in the configuration must be that of the arrays, or the scaling would be wrong."""
    change_config(peft, r=3)

    with pytest.raises(DataError, match=r"has shape \(2, 6\), expected \(3, 6\)"):
        read_peft(peft, SPEC.slots)


def test_half_an_adapter_is_refused(peft: Path) -> None:
    """An A without its B is refused."""
    arrays = load_file(peft / "adapter_model.safetensors")
    save_file({name: array for name, array in arrays.items() if name != FIRST.b}, peft / "adapter_model.safetensors")

    with pytest.raises(DataError, match="1 missing"):
        read_peft(peft, SPEC.slots)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"[]", b"{}", b"\xff"])
def test_what_is_no_peft_folder_is_refused(peft: Path, name: str, content: bytes | None) -> None:
    """Missing, empty and garbled files are a DataError that names the folder."""
    (peft / name).unlink()
    if content is not None:
        (peft / name).write_bytes(content)

    with pytest.raises(DataError, match="not a PEFT LoRA directory"):
        read_peft(peft, SPEC.slots)


def test_bfloat16_is_read(tmp_path: Path) -> None:
    """A PEFT directory in bfloat16, which numpy does not know, is read as the float32 values it stands for."""
    arrays = {name: torch.from_numpy(array).to(torch.bfloat16) for name, array in SPEC.start(3).items()}
    factories.write_peft(tmp_path, SPEC.start(3), SPEC, "base")
    save_torch(arrays, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    found, _ = read_peft(tmp_path, SPEC.slots)

    assert all((found[name] == array.float().numpy()).all() for name, array in arrays.items())


@pytest.mark.parametrize(
    ("key", "value"),
    [("init_lora_weights", "pissa"), ("fan_in_fan_out", True), ("modules_to_save", ["score"]), ("layer_replication", [[0, 2]]),
     ("lora_bias", True), ("use_qalora", True)],
)  # fmt: skip
def test_settings_a_device_could_not_follow_are_refused(tmp_path: Path, key: str, value: object) -> None:
    """What changes the base, or adds what the arrays do not show, is refused by name."""
    factories.write_peft(tmp_path, SPEC.start(3), SPEC, "base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(DataError, match=f"{key} is .* only plain LoRA"):
        read_peft(tmp_path, SPEC.slots)
