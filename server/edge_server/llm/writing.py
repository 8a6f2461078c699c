"""Continuations of many prompts by a causal LM: one batch with a KV cache, each prompt read once, nucleus sampling."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from edge_sdk.engines import Sampling
from edge_sdk.tokens import Ids

ROWS = 64  # written at a time: the weights are read once a step for all of them, and the cache stays small
WIDTH = 1024  # a nucleus has at most so many tokens: choosing these is much cheaper than sorting the vocabulary


@torch.no_grad()
def continuations(
    bare: Any,
    logits: Callable[[Tensor], Tensor],
    prompts: Sequence[Ids],
    counts: Sequence[int],
    sampling: Sampling,
    ends: Sequence[int],
) -> list[list[Ids]]:
    """`counts[i]` continuations of `prompts[i]`, each up to `sampling.max_tokens` tokens or to one of `ends`, with it.

    Args:
        bare: a transformers decoder without its head. logits: of final hidden states (n, width): (n, V).
    """
    generator = torch.Generator().manual_seed(sampling.seed)
    wanted = [i for i, count in enumerate(counts) for _ in range(count)]
    found: list[list[Ids]] = [[] for _ in prompts]
    for at in range(0, len(wanted), ROWS):
        rows = wanted[at : at + ROWS]
        written: list[Ids] = [[] for _ in rows]
        if sampling.max_tokens:
            for alive, tokens in _steps(bare, logits, prompts, rows, sampling, ends, generator):
                for row, token in zip(alive, tokens, strict=True):
                    written[row].append(token)
        for i, ids in zip(rows, written, strict=True):
            found[i].append(ids)
    return found


def _steps(
    bare: Any,
    logits: Callable[[Tensor], Tensor],
    prompts: Sequence[Ids],
    rows: Sequence[int],
    sampling: Sampling,
    ends: Sequence[int],
    generator: torch.Generator,
) -> Iterator[tuple[list[int], list[int]]]:
    """The next token of every row that has not ended: (row indices, tokens); rows that ended leave the cache."""
    from transformers import DynamicCache

    distinct = sorted(set(rows))
    longest = max(len(prompts[i]) for i in distinct)
    ids = torch.tensor([[0] * (longest - len(prompts[i])) + list(prompts[i]) for i in distinct])  # padded on the left
    mask = torch.tensor([[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in distinct])
    cache = DynamicCache()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    states = bare(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
    first = torch.tensor([distinct.index(i) for i in rows])
    cache.batch_select_indices(first)
    mask, positions, alive = mask[first], positions[first, -1:], torch.arange(len(rows))
    last, stop = states.last_hidden_state[first, -1], torch.tensor(list(ends), dtype=torch.long)
    for step in range(sampling.max_tokens):
        chosen = choose(logits(last), sampling, generator)
        going = (~torch.isin(chosen, stop)).nonzero()[:, 0]
        yield alive.tolist(), chosen.tolist()
        if not len(going):
            return
        if len(going) < len(chosen):
            cache.batch_select_indices(going)
            mask, positions, alive, chosen = mask[going], positions[going], alive[going], chosen[going]
        if step + 1 < sampling.max_tokens:
            mask, positions = torch.cat([mask, mask.new_ones(len(mask), 1)], 1), positions + 1
            states = bare(
                input_ids=chosen[:, None], attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            )
            last = states.last_hidden_state[:, -1]


def choose(scores: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """One token a row of scores (n, V): (n,). The nucleus is the smallest set with `top_p` of the probability (Holtzman et al.
    2020, section 3.1), or the `WIDTH` likeliest where that is fewer; temperature 0 takes the likeliest."""
    if not sampling.temperature:
        return scores.argmax(1)
    probabilities = torch.softmax(scores / sampling.temperature, 1)
    if sampling.top_p == 1:
        return _draw(probabilities, generator)
    top = probabilities.topk(min(WIDTH, probabilities.shape[1]), dim=1)
    before = top.values.cumsum(1) - top.values
    kept = torch.where(before < sampling.top_p, top.values, 0)
    return top.indices.gather(1, _draw(kept, generator)[:, None])[:, 0]


def _draw(weights: Tensor, generator: torch.Generator) -> Tensor:
    """An index a row, by weight; one of weight 0 never."""
    summed = weights.cumsum(1)
    u = torch.rand(len(weights), 1, generator=generator, dtype=weights.dtype) * summed[:, -1:]
    return torch.searchsorted(summed, u, right=True)[:, 0].clamp(max=weights.shape[1] - 1)
