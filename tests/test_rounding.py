"""Integers stay in their bounds, GPTQ beats the nearest integer, and the sensitive layer is found."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from edge_export import rounding
from edge_export.families import Group
from edge_export.smooth import Site
from tests import strategies  # noqa: F401  # its hypothesis profile


def matrix(seed: int, rows: int, columns: int, size: float = 1.0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * size


def test_two_products_fit_into_sixteen_bits() -> None:
    """The largest activation times the largest weight, twice, is what a 16-bit sum can hold: no processor saturates."""
    largest_weight = 2 ** (rounding.WEIGHT_BITS - 1) - 1

    assert 2 * 255 * largest_weight <= 2**15 - 1


@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 40), st.floats(1e-3, 1e3))
def test_integers_stay_in_their_bounds(seed: int, rows: int, columns: int, size: float) -> None:
    """Both ways of rounding give whole numbers within 7 bits and positive scales, for weights of any size."""
    weight, x = matrix(seed, rows, columns, size), matrix(seed + 1, 50, columns)
    for rounded in (rounding.nearest(weight), rounding.gptq(weight, x)):
        assert rounded.integers.shape == weight.shape
        assert (rounded.integers == rounded.integers.round()).all()
        assert rounded.integers.abs().max() <= 63
        assert (rounded.scale > 0).all()


def test_the_nearest_integer_is_at_most_half_a_step_away() -> None:
    """Rounding to nearest is off by half a step at most."""
    weight = matrix(0, 20, 30)
    rounded = rounding.nearest(weight)

    assert ((rounded.dequantized() - weight).abs() <= rounded.scale[:, None] / 2 + 1e-7).all()


def test_gptq_beats_the_nearest_integer_on_inputs_that_vary_together() -> None:
    """Where inputs are correlated, letting later columns make good for earlier ones at least halves the output error."""
    x = matrix(1, 500, 8) @ matrix(2, 8, 64) + 0.05 * matrix(3, 500, 64)
    weight = matrix(4, 32, 64)

    def error(rounded: rounding.Rounded) -> float:
        return float((x @ (rounded.dequantized() - weight).T).square().mean())

    assert error(rounding.gptq(weight, x)) < error(rounding.nearest(weight)) / 2


def test_columns_nobody_uses_do_not_break_gptq() -> None:
    """An input channel that is always zero leaves the others finite."""
    x = matrix(1, 100, 16)
    x[:, 5] = 0
    rounded = rounding.gptq(matrix(2, 4, 16), x)

    assert torch.isfinite(rounded.dequantized()).all()


def test_each_token_has_its_own_scale() -> None:
    """A token a thousand times larger leaves the others' rounding as it was."""
    x = matrix(0, 5, 16)
    alone = rounding.fake_activations(x)
    x[2] *= 1000

    kept = [0, 1, 3, 4]
    assert (rounding.fake_activations(x)[kept] == alone[kept]).all()
    assert ((rounding.fake_activations(x) - x).abs() <= x.abs().amax(1, keepdim=True) / 254 + 1e-6).all()


class Chain(nn.Module):
    """Two layers; the second one's output is what the score sees, the first one's hardly."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 16)
        self.weak, self.strong = nn.Linear(16, 4), nn.Linear(16, 4)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        total: Tensor = (0.01 * self.weak(x) + self.strong(x)).sum()
        return total


def test_the_layer_that_matters_is_found() -> None:
    """Of two layers with the same rounding error, the one the score depends on is said to do 10,000 times the damage."""
    torch.manual_seed(0)
    model = Chain()
    model.strong.load_state_dict(model.weak.state_dict())
    places = [Site(0, Group(("x",)), (name,), (getattr(model, name),), None) for name in ("weak", "strong")]
    rounded = {place.name: rounding.nearest(place.linears[0].weight.detach()) for place in places}
    harm = rounding.damage(model, places, rounded, [[1, 2], [3, 4, 5]], lambda m, ids: m(torch.tensor([ids])))

    assert harm["weak"] > 0
    assert abs(harm["strong"] / harm["weak"] - 10_000) < 100
    assert all(p.grad is None for p in model.parameters())
