"""Activation smoothing: moves the spread of a layer's input channels into its weights, exactly, before quantization.

A linear layer x W^T is the same as (x / s) (W s)^T, and dividing x by s is free where a norm or another linear layer writes
x: its rows are divided instead. Source: Xiao et al. 2023, "SmoothQuant", section 4; the strength is searched for each layer
on its own output error as in Lin et al. 2024, "AWQ", section 3.2.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edge_export.families import Family, Group
from edge_export.rounding import fake_activations, nearest
from edge_sdk.tokens import Ids

STRENGTHS = (0.35, 0.5, 0.6, 0.7, 0.8)
ROWS = 1024  # of calibration input for the search


@dataclass(frozen=True)
class Site:
    """A group of linear layers in one layer of a model: module paths, and the modules themselves."""

    layer: int
    group: Group
    names: tuple[str, ...]
    linears: tuple[nn.Linear, ...]
    source: Any  # a norm or a linear layer; None where nothing can be folded

    @property
    def name(self) -> str:
        return self.names[0]


def sites(model: Any, family: Family) -> Iterator[Site]:
    """Every group of every layer, from the input to the output."""
    for index, layer in enumerate(model.get_submodule(family.layers)):
        for group in family.groups:
            names = tuple(f"{family.layers}.{index}.{sink}" for sink in group.sinks)
            source = layer.get_submodule(group.source) if group.source else None
            yield Site(index, group, names, tuple(layer.get_submodule(sink) for sink in group.sinks), source)


def inputs(model: nn.Module, places: Sequence[Site], sequences: Sequence[Ids]) -> dict[str, Tensor]:
    """What each site reads when the model reads `sequences`: (tokens, in_features)."""
    seen: dict[str, list[Tensor]] = {place.name: [] for place in places}

    def keep(name: str) -> Any:
        return lambda _, args: seen[name].append(args[0].detach().reshape(-1, args[0].shape[-1]).clone())

    hooks = [place.linears[0].register_forward_pre_hook(keep(place.name)) for place in places]
    with torch.inference_mode():
        for ids in sequences:
            model(input_ids=torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def search(place: Site, x: Tensor, heads: tuple[int, int], bits: int) -> Tensor:
    """The scale (in_features,) under which rounding x and W to integers changes x W^T least, row by row."""
    weight = torch.cat([linear.weight.detach() for linear in place.linears])
    some = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:ROWS]
    x = x[some]
    exact = x @ weight.T
    size = exact.square().sum(1)
    best, found = float("inf"), torch.ones(x.shape[1])
    for root in (2, 4):
        spread = x.abs().pow(root).mean(0).pow(1 / root)
        for strength in STRENGTHS:
            scale = _scale(place, spread, weight.abs().amax(0), strength, heads)
            rounded = fake_activations(x / scale) @ nearest(weight * scale, bits).dequantized().T
            error = float(((exact - rounded).square().sum(1) / size.clamp_min(1e-12)).mean())
            if error < best:
                best, found = error, scale
    return found


def _scale(place: Site, spread: Tensor, weight: Tensor, strength: float, heads: tuple[int, int]) -> Tensor:
    """s = spread^strength / |W|^(1 - strength), around 1; value channels that several query heads read share theirs."""
    if _shared(place):
        spread, weight = _over_heads(spread, heads), _over_heads(weight, heads)
    scale = spread.clamp_min(1e-5) ** strength / weight.clamp_min(1e-5) ** (1 - strength)
    return scale / scale.median()


def _shared(place: Site) -> bool:
    """Whether several query heads read the same value channels (grouped-query attention)."""
    return isinstance(place.source, nn.Linear) and place.source.out_features != place.linears[0].in_features


def _over_heads(values: Tensor, heads: tuple[int, int]) -> Tensor:
    """The largest over the query heads of each key-value head, (heads * size,) -> the same shape."""
    queries, keys = heads
    grouped = values.view(keys, queries // keys, -1)
    return grouped.amax(1, keepdim=True).expand_as(grouped).reshape(-1)


@torch.no_grad()
def fold(place: Site, scale: Tensor, heads: tuple[int, int]) -> Tensor | None:
    """Divides the source's output by `scale` and multiplies the sinks' columns; the model computes what it did.

    Returns:
        What the rows of the source were divided by, (out_features,), if it is a linear layer; None if it is a norm.
    """
    for linear in place.linears:
        linear.weight *= scale
    source = place.source
    if not isinstance(source, nn.Linear):
        source.weight.copy_((source.weight + place.group.offset) / scale - place.group.offset)
        return None
    divisor = scale
    if _shared(place):
        divisor = scale.view(heads[1], heads[0] // heads[1], -1)[:, 0].reshape(-1)
    source.weight.div_(divisor[:, None])
    if source.bias is not None:
        source.bias.div_(divisor)
    return divisor


@dataclass(frozen=True)
class Smoothed:
    """How the weights of the smoothed model differ: adapters made for the original need the same treatment.

    Args:
        columns: module -> what its input was divided by, (in_features,).
        rows: module -> what its output was divided by, (out_features,).
    """

    columns: Mapping[str, Tensor]
    rows: Mapping[str, Tensor]


def smooth(model: Any, family: Family, sequences: Sequence[Ids], bits: int) -> tuple[Smoothed, dict[str, Tensor]]:
    """Smooths `model` in place.

    Returns:
        What was folded where, and what each site reads now, (tokens, in_features).
    """
    heads = model.config.num_attention_heads, getattr(model.config, "num_key_value_heads", model.config.num_attention_heads)
    places = list(sites(model, family))
    read = inputs(model, places, sequences)
    columns: dict[str, Tensor] = {}
    rows: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    for place in places:  # all searches see the original weights
        if place.source is not None:
            scales[place.name] = search(place, read[place.name], heads, bits)
    for place in places:
        if place.source is None:
            continue
        scale = scales[place.name]
        columns |= dict.fromkeys(place.names, scale)
        if (divisor := fold(place, scale, heads)) is not None:
            rows[f"{family.layers}.{place.layer}.{place.group.source}"] = divisor
        read[place.name] = read[place.name] / scale
    return Smoothed(columns, rows), read
