"""Smoothing is exact in float, and makes rounding hurt less."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from edge_export import smooth
from edge_export.families import family_of
from edge_export.rounding import fake_activations, nearest
from edge_sdk.training.base import load_path
from edge_sdk.training.learner import readout
from tests import tiny

SEQUENCES = [[5, 9, 17, 6], [12, 4, 7, 8, 20, 11], [22, 5], [9, 9, 18, 27, 13]]


@pytest.fixture(params=tiny.FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    family = family_of(request.param)
    loaded = load_path(tiny.write(tmp_path, request.param), family.kind)
    torch.set_float32_matmul_precision("highest")
    return loaded


def family(model: Any) -> Any:
    return family_of(model.config.model_type)


def test_the_smoothed_model_computes_what_it_did(model: Any) -> None:
    """Folding scales between layers changes no readout by more than 1e-4 of its size, in any family."""
    kind = family(model).kind
    with torch.no_grad():
        before = readout(model, kind, SEQUENCES)
        smooth.smooth(model, family(model), SEQUENCES, bits=7)
        after = readout(model, kind, SEQUENCES)

    assert float((after - before).abs().max() / before.abs().max()) < 1e-4


def test_smoothing_moves_weights_where_it_says(model: Any) -> None:
    """Every column scale is that of a sink whose weights changed, and some weights do change."""
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    smoothed, _ = smooth.smooth(model, family(model), SEQUENCES, bits=7)

    assert smoothed.columns
    for module in smoothed.columns:
        before, after = weights[f"{module}.weight"], model.get_submodule(module).weight.detach()
        expected = before * smoothed.columns[module]
        if module in smoothed.rows:
            expected = expected / smoothed.rows[module][:, None]
        torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-7)


def test_what_each_site_reads_is_what_it_will_read(model: Any) -> None:
    """The activations handed on for rounding are those of the smoothed model."""
    _, read = smooth.smooth(model, family(model), SEQUENCES, bits=7)
    again = smooth.inputs(model, list(smooth.sites(model, family(model))), SEQUENCES)

    assert read.keys() == again.keys()
    for name, x in read.items():
        torch.testing.assert_close(x, again[name], rtol=2e-3, atol=2e-4)


def test_an_outlier_channel_costs_less_after_smoothing() -> None:
    """With one channel fifty times the others, the searched scale at least halves the error of rounding."""
    torch.manual_seed(0)
    linear, source = torch.nn.Linear(16, 8, bias=False), torch.nn.LayerNorm(16)
    x = torch.randn(200, 16)
    x[:, 3] *= 50
    group = family_of("llama").groups[0]
    place = smooth.Site(0, group, ("q",), (linear,), source)
    scale = smooth.search(place, x, (2, 2), bits=7)
    exact = x @ linear.weight.T

    def error(s: torch.Tensor) -> float:
        rounded = fake_activations(x / s) @ nearest(linear.weight.detach() * s).dequantized().T
        return float((rounded - exact).detach().square().mean())

    assert error(scale) < error(torch.ones(16)) / 2
