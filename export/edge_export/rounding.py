"""Weights and activations as small integers: round to nearest, GPTQ, and which layers need finer activations. torch only.

Weights take 7 bits, one scale for each output; activations 8 bits, one scale for each token. With 7 bits no sum of two
products leaves 16 bits, so processors without integer dot products (x86 before VNNI) give the same answer as all others,
and one file serves them all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from edge_sdk.tokens import Ids

if TYPE_CHECKING:
    from edge_export.smooth import Site

WEIGHT_BITS = 7
LEVELS = 127  # of an activation, to each side


@dataclass(frozen=True)
class Rounded:
    """A weight matrix as integers (out, in) and a scale for each row (out,)."""

    integers: Tensor
    scale: Tensor

    def dequantized(self) -> Tensor:
        return self.integers * self.scale[:, None]


def nearest(weight: Tensor, bits: int = WEIGHT_BITS) -> Rounded:
    """Every weight to its nearest integer."""
    limit = 2 ** (bits - 1) - 1
    scale = (weight.abs().amax(1) / limit).clamp_min(1e-12)
    return Rounded((weight / scale[:, None]).round(), scale)


def fake_activations(x: Tensor) -> Tensor:
    """x (..., width) as 8-bit integers with a scale for each row, and back."""
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-6) / LEVELS
    return (x / scale).round() * scale


def gptq(weight: Tensor, x: Tensor, bits: int = WEIGHT_BITS, block: int = 128) -> Rounded:
    """Rounds column by column, and lets the columns not yet rounded make good for the error as far as inputs like x allow.

    Source: Frantar et al. 2023, "GPTQ", section 3, algorithm 1. Rows of x count alike, whatever their size.

    Args:
        weight: (out, in).
        x: calibration input (tokens, in).
    """
    limit = 2 ** (bits - 1) - 1
    first = nearest(weight, bits)
    scale = first.scale.double()
    unit = x.double() / x.double().square().mean(1, keepdim=True).sqrt().clamp_min(1e-12)
    hessian = unit.T @ unit
    hessian += torch.eye(len(hessian)) * 0.01 * hessian.diagonal().mean().clamp_min(1e-12)
    order = torch.argsort(hessian.diagonal(), descending=True)
    hessian = hessian[order][:, order]
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    left = weight.double()[:, order].clone()
    integers = torch.empty_like(left)
    for start in range(0, left.shape[1], block):
        end = min(start + block, left.shape[1])
        errors = torch.empty_like(left[:, start:end])
        for column in range(start, end):
            rounded = (left[:, column] / scale).round().clamp(-limit, limit)
            integers[:, column] = rounded
            error = (left[:, column] - rounded * scale) / inverse[column, column]
            left[:, column:end] -= error[:, None] * inverse[column, column:end]
            errors[:, column - start] = error
        left[:, end:] -= errors @ inverse[start:end, end:]
    return Rounded(integers[:, torch.argsort(order)].float(), first.scale)


def round_all(places: Sequence[Site], read: Mapping[str, Tensor]) -> dict[str, Rounded]:
    """Every linear layer of every site, by module path; the layers of a site read the same and are rounded together."""
    found: dict[str, Rounded] = {}
    for place in places:
        whole = gptq(torch.cat([linear.weight.detach() for linear in place.linears]), fake_activations(read[place.name]))
        sizes = [linear.out_features for linear in place.linears]
        parts = zip(place.names, torch.split(whole.integers, sizes), torch.split(whole.scale, sizes), strict=True)
        found |= {name: Rounded(integers, scale) for name, integers, scale in parts}
    return found


def damage(
    model: Any,
    places: Sequence[Site],
    rounded: Mapping[str, Rounded],
    sequences: Sequence[Ids],
    score: Callable[[Any, Ids], Tensor],
) -> dict[str, float]:
    """How much each site's rounding of activations moves the score: the mean square of its first-order effect.

    The effect of an error e in a site's output y on the score f is <df/dy, e>: one backward pass tells it for all sites
    (the gradient as a measure of sensitivity, as in Dong et al. 2019, "HAWQ", to first order).

    Args:
        score: (model, ids) -> one number, differentiable.
    """
    total = dict.fromkeys((place.name for place in places), 0.0)
    taps: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def tap(site: str, weight: Tensor) -> Any:
        def hook(_: Any, args: Any, y: Tensor) -> None:
            y.retain_grad()
            x = args[0].detach()
            taps.setdefault(site, []).append((y, (fake_activations(x) - x) @ weight.T))

        return hook

    hooks = [
        linear.register_forward_hook(tap(place.name, rounded[name].dequantized()))
        for place in places
        for name, linear in zip(place.names, place.linears, strict=True)
    ]
    model.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(True)  # so that gradients flow, and no weight pays for its own
    for ids in sequences:
        taps.clear()
        score(model, ids).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        for site, pairs in taps.items():
            total[site] += sum(float((y.grad * error).sum()) for y, error in pairs if y.grad is not None) ** 2
    model.zero_grad(set_to_none=True)
    for handle in hooks:
        handle.remove()
    return {site: value / len(sequences) for site, value in total.items()}
