"""A part of an adapter: what it covers, and what the wire lets through."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk import wire
from edge_sdk.adapters import AdapterSpec, Array, Slot, below, take
from edge_sdk.errors import DataError, SettingsError, WireError
from edge_sdk.protocol import Manifest, Problem, Update
from edge_server import settings as run_settings
from edge_server.aggregation import Contribution, products
from edge_server.settings import AdapterSettings, RunSettings
from edge_server.systems.lpfl import LpFl
from tests import factories
from tests import server_helpers as helpers

SLOTS = tuple(Slot(f"layer.{i}.{name}", 6, 5) for i in (1, 2, 10) for name in ("query", "value"))
SPEC = AdapterSpec(SLOTS, rank=4, alpha=8.0)


def arrays(spec: AdapterSpec, seed: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(0, 1, shape).astype(np.float32) for name, shape in spec.shapes().items()}


def manifest(min_layers: int = 1, min_rank: int = 2, freeze_a: bool = False) -> Manifest:
    spec = msgspec.structs.replace(SPEC, freeze_a=freeze_a)
    return msgspec.structs.replace(factories.manifest(spec), min_layers=min_layers, min_rank=min_rank)


def test_a_part_is_the_highest_layers_and_the_first_components() -> None:
    """Layers count by number; the scale alpha / rank stays, so that components mean the same."""
    part = SPEC.part(9, 2)

    assert [slot.module for slot in part.slots] == ["layer.2.query", "layer.2.value", "layer.10.query", "layer.10.value"]
    assert (part.rank, part.scaling) == (2, SPEC.scaling)
    assert SPEC.depth == 10
    assert SPEC.part(10, 4) == SPEC


@pytest.mark.parametrize(("layers", "rank"), [(0, 4), (11, 4), (1, 0), (1, 5)])
def test_there_is_no_larger_part(layers: int, rank: int) -> None:
    """None of nothing, none of more than there is."""
    with pytest.raises(DataError, match="no part"):
        SPEC.part(layers, rank)


def test_taking_a_part_gives_its_shapes() -> None:
    """First rows of A, first columns of B, exactly what the part says."""
    whole, part = arrays(SPEC), SPEC.part(1, 3)
    taken = take(whole, part)

    assert {name: array.shape for name, array in taken.items()} == part.shapes()
    assert (taken[SLOTS[-1].a] == whole[SLOTS[-1].a][:3]).all()
    assert (taken[SLOTS[-1].b] == whole[SLOTS[-1].b][:, :3]).all()


def test_what_lies_below_a_split() -> None:
    """The lower slots at full rank; nothing where they change nothing or there are none."""
    whole = arrays(SPEC)
    lower = below(whole, SPEC, 10)

    assert lower is not None
    assert {slot.layer for slot in lower.spec.slots} == {1, 2}
    assert lower.arrays.keys() == lower.spec.shapes().keys()
    assert below(whole, SPEC, 1) is None
    assert below(SPEC.start(0), SPEC, 10) is None


def pack(layers: int, rank: int, spec: AdapterSpec, names: Any = None) -> bytes:
    chosen = {name: array for name, array in arrays(spec).items() if names is None or name in names}
    return wire.pack(Update("d1", 0, 1, {}, layers=layers, rank=rank), chosen)


@pytest.mark.parametrize(("layers", "rank"), [(0, 0), (10, 4), (1, 2), (9, 3), (1, 0), (0, 2)])
def test_a_part_the_run_allows_passes(layers: int, rank: int) -> None:
    """Every depth and rank within the range; 0 means all."""
    part = SPEC.part(layers or 10, rank or 4)
    update, found = wire.unpack(pack(layers, rank, part), wire.update_shapes(manifest()))

    assert (update.layers, update.rank) == (layers, rank)
    assert {name: array.shape for name, array in found.items()} == part.shapes()


def test_with_a_frozen_only_b_travels() -> None:
    """FFA-LoRA: an update that brings A is refused, one with B alone passes."""
    shapes = wire.update_shapes(manifest(freeze_a=True))
    part = SPEC.part(1, 2)
    found = wire.unpack(pack(1, 2, part, {slot.b for slot in part.slots}), shapes)[1]

    assert found.keys() == {slot.b for slot in part.slots}
    with pytest.raises(WireError) as refused:
        wire.unpack(pack(1, 2, part), shapes)
    assert refused.value.code == "wrong-shape"


@pytest.mark.parametrize(
    ("layers", "rank", "code", "status"),
    [
        (1, 1, "wrong-part", 422),
        (11, 4, "wrong-part", 422),
        (1, 5, "wrong-part", 422),
        (-1, 4, "bad-message", 400),
        (1, -1, "bad-message", 400),
        (10**9, 4, "bad-message", 400),
        (2, 3, "wrong-shape", 422),
        (1, 3, "wrong-shape", 422),
    ],
)
def test_a_part_the_run_forbids_is_refused(layers: int, rank: int, code: str, status: int) -> None:
    """Out of range, out of bounds, or not the shapes of the part that is claimed."""
    with pytest.raises(WireError) as refused:
        wire.unpack(pack(layers, rank, SPEC.part(1, 2)), wire.update_shapes(manifest()))

    assert (refused.value.code, refused.value.status) == (code, status)


@given(st.integers(-1, 12), st.integers(-1, 6), st.integers(0, 10), st.integers(0, 4))
def test_a_claim_passes_exactly_where_the_run_allows_it(layers: int, rank: int, min_layers: int, min_rank: int) -> None:
    """For any claim and any run: within the range the part's own shapes are wanted, outside it is refused by its code."""
    shapes = wire.update_shapes(manifest(min_layers, min_rank))
    claimed = (layers or 10, rank or 4)
    allowed = (min_layers or 10) <= claimed[0] <= 10 and (min_rank or 4) <= claimed[1] <= 4
    body = pack(layers, rank, SPEC.part(*claimed) if allowed else SPEC)
    if allowed:
        assert wire.unpack(body, shapes)[1].keys() == SPEC.part(*claimed).shapes().keys()
        return
    with pytest.raises(WireError) as refused:
        wire.unpack(body, shapes)
    assert refused.value.code == ("bad-message" if min(layers, rank) < 0 else "wrong-part")


def test_without_a_choice_only_the_whole_passes() -> None:
    """A run with one depth and one rank takes nothing less."""
    with pytest.raises(WireError, match="trains 10 to 10 layers at rank 4 to 4"):
        wire.unpack(pack(1, 2, SPEC.part(1, 2)), wire.update_shapes(manifest(0, 0)))


async def test_devices_of_different_depth_and_rank_make_a_version(tmp_path: Path) -> None:
    """Over HTTP, with products: a stale update of one layer at rank 1 beside a fresh whole one; each from its own base."""
    adapter = AdapterSettings(rank=2, alpha=4.0, min_layers=1, min_rank=1)
    system = LpFl(versions=9, buffer_size=1, evaluate_every=0, average="products")
    run = RunSettings(factories.ENCODER_TASK, adapter=adapter, lpfl=system)
    spec = factories.SPEC
    versions = [spec.start(0)]
    async with helpers.running(tmp_path, run) as server:
        await server.enroll("d1", "d2")
        sent = [("d1", 0, 0, 0), ("d2", 0, 1, 1), ("d1", 2, 2, 2)]
        for version, (device, base, layers, rank) in enumerate(sent, 1):
            part = spec.part(layers or 2, rank or 2)
            delta = arrays(part, version)
            await server.send(wire.pack(Update(device, base, 5, {}, layers=layers, rank=rank), delta))
            await server.reaches(version)
            update = Contribution(delta, 5, version - 1 - base, versions[base])
            versions.append(products(versions[-1], spec, [update]))
        body = await (await server.client.get(f"/v1/blobs/{(await server.status()).adapter}")).read()

    found = wire.unpack_adapter(body, spec.shapes())
    assert all((found[name] == array).all() for name, array in versions[-1].items())
    assert any((found[name] != array).any() for name, array in versions[0].items())


async def test_two_devices_make_the_mean_of_what_their_factors_do(tmp_path: Path) -> None:
    """Over HTTP, against a dense SVD: one trains all at rank 2, one the top layer at rank 1 with three times the examples."""
    adapter = AdapterSettings(rank=2, alpha=4.0, min_layers=1, min_rank=1)
    system = LpFl(buffer_size=2, evaluate_every=0, average="products")
    spec, sizes = factories.SPEC, ((2, 2, 5), (1, 1, 15))
    start = spec.start(0)  # B is zero, so BA is what was learned
    deltas = [arrays(spec.part(layers, rank), layers) for layers, rank, _ in sizes]
    async with helpers.running(tmp_path, RunSettings(factories.ENCODER_TASK, adapter=adapter, lpfl=system)) as server:
        await server.enroll("d1", "d2")
        for device, (layers, rank, examples), delta in zip(("d1", "d2"), sizes, deltas, strict=True):
            await server.send(wire.pack(Update(device, 0, examples, {}, layers=layers, rank=rank), delta))
        await server.reaches(1)
        body = await (await server.client.get(f"/v1/blobs/{(await server.status()).adapter}")).read()

    new = wire.unpack_adapter(body, spec.shapes())
    low, top = spec.slots
    trained = [{s: d[s.b] @ (start[s.a][: len(d[s.a])] + d[s.a]) for s in spec.slots if s.a in d} for d in deltas]
    u, sigma, v = np.linalg.svd((5 * trained[0][top] + 15 * trained[1][top]) / 20)
    np.testing.assert_allclose(new[top.b] @ new[top.a], (u[:, :2] * sigma[:2]) @ v[:2], atol=1e-4)
    np.testing.assert_allclose(new[low.b] @ new[low.a], trained[0][low], atol=1e-4)


async def test_a_forbidden_part_is_refused_over_http(tmp_path: Path) -> None:
    """A run of one depth and rank answers a part with 422 and `wrong-part`, and keeps nothing of it."""
    body = wire.pack(Update("d1", 0, 1, {}, layers=1, rank=1), arrays(factories.SPEC.part(1, 1)))
    async with helpers.running(tmp_path) as server:
        await server.enroll("d1")
        before = helpers.blobs(tmp_path)
        answer = await server.client.post("/v1/results", data=body, headers={"Content-Type": wire.TENSORS_TYPE})
        problem = wire.decode(await answer.read(), Problem)

        assert (answer.status, problem.code) == (422, "wrong-part")
        assert "trains 2 to 2 layers at rank 2 to 2" in problem.detail
        assert (await server.status()).buffered == 0
        assert helpers.blobs(tmp_path) == before


# A run's settings -----------------------------------------------------------------------------------------------------
def test_different_ranks_need_a_rule_that_can_average_them() -> None:
    """With factors a smaller rank is refused when the file is read; products and a frozen A take it."""
    with pytest.raises(SettingsError, match="different ranks have no mean"):
        RunSettings(factories.ENCODER_TASK, adapter=AdapterSettings(rank=4, min_rank=2))
    with pytest.raises(SettingsError, match="would change A"):
        RunSettings(factories.ENCODER_TASK, adapter=AdapterSettings(freeze_a=True), lpfl=LpFl(average="products"))
    RunSettings(factories.ENCODER_TASK, adapter=AdapterSettings(rank=4, min_rank=4))
    RunSettings(factories.ENCODER_TASK, adapter=AdapterSettings(rank=4, min_rank=2, freeze_a=True))
    RunSettings(factories.ENCODER_TASK, adapter=AdapterSettings(rank=4, min_rank=2), lpfl=LpFl(average="products"))


@pytest.mark.parametrize("change", [{"min_layers": -1}, {"min_rank": -1}, {"rank": 4, "min_rank": 5}])
def test_ranges_out_of_bounds_are_refused(change: dict[str, Any]) -> None:
    """Each bound is checked when the settings are made."""
    with pytest.raises(SettingsError):
        AdapterSettings(**change)


def test_a_run_cannot_ask_for_more_layers_than_there_are() -> None:
    """`min_layers` beyond the adapter's depth is found when the bundle is known; what is allowed reaches the devices."""
    bundle = factories.bundle(slots=SLOTS)
    settings = RunSettings(factories.ENCODER_TASK, adapter=AdapterSettings(rank=4, min_layers=3, freeze_a=True))
    made = run_settings.manifest(settings, bundle)

    assert (made.min_layers, made.min_rank, made.adapter.freeze_a) == (3, 0, True)
    with pytest.raises(SettingsError, match="min_layers = 11 is more"):
        run_settings.manifest(RunSettings(factories.ENCODER_TASK, adapter=AdapterSettings(min_layers=11)), bundle)
