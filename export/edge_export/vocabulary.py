"""A smaller tokenizer of a model's own, learnt from text, and the model's embeddings in its tokens; pure.

Fast Vocabulary Transfer (Gee et al. 2022): a token that the old tokenizer has keeps its row, any other starts as the mean of the
rows of the old tokens that spell it. Both tokenizers are byte-level BPE (Radford et al. 2019), so all 256 bytes are tokens, and
every text can be spelled. How text is normalized and cut into words before that, and what is special, is the old one's.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, trainers
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn

from edge_sdk.errors import DataError

ALPHABET = tuple(sorted(ByteLevel.alphabet()))  # one character for each byte
LEAST_COUNT = 2  # times that two tokens must stand side by side in the texts to become one
TABLES = ("model.embed_tokens.weight", "lm_head.weight")


# The tokenizer --------------------------------------------------------------------------------------------------------
def check(size: int, like: Tokenizer, ends: Sequence[int] = ()) -> None:
    """Whether a tokenizer of `size` tokens can take the place of `like`.

    Args:
        ends: ids that end a text.

    Raises:
        DataError: `like` is no byte-level BPE, has no more tokens than that, or an end that is no added token; or `size` is too
        small for the bytes, the added tokens and one more.
    """
    state = json.loads(like.to_str())
    if state["model"]["type"] != "BPE" or '"ByteLevel"' not in json.dumps(state["pre_tokenizer"]):
        raise DataError("this model's tokenizer is no byte-level BPE, and no other is made smaller; leave --vocabulary out")
    added = _added(state)
    lost = [token for i in ends if (token := like.id_to_token(i)) is not None and token not in added]
    if lost:
        raise DataError(f"{lost[0]!r} ends a text and is no special token, so it would be lost; leave --vocabulary out")
    least, most = len({*added, *ALPHABET}) + 1, like.get_vocab_size() - 1
    if not least <= size <= most:
        raise DataError(
            f"a vocabulary of {size} tokens cannot be made: choose {least} to {most}, more than the 256 bytes and "
            f"{len(added)} special tokens that every text needs, and fewer than the model has"
        )


def train(texts: Sequence[str], size: int, like: Tokenizer, words: Sequence[str] = ()) -> Tokenizer:
    """A byte-level BPE tokenizer of exactly `size` tokens; the same texts give the same tokens.

    The added tokens of `like`, special or not, come first, in their order; normalizer, pre-tokenizer and what is put around a
    text stay as they are.

    Args:
        words: that stay one token if they are one of `like`; each is read as often as there are texts.

    Raises:
        DataError: what `check` refuses; or the texts repeat too little for so many tokens, or `size` is too small for the words.
    """
    check(size, like)
    state = json.loads(like.to_str())
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = like.pre_tokenizer
    if like.normalizer is not None:
        bare.normalizer = like.normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=size, min_frequency=LEAST_COUNT, initial_alphabet=list(ALPHABET), show_progress=False, special_tokens=[]
    )
    whole = [word for word in words if len(_spelled(like, word)) == 1]
    bare.train_from_iterator([*texts, *whole * len(texts)], trainer)
    learnt = json.loads(bare.to_str())["model"]
    by_id = sorted(learnt["vocab"], key=learnt["vocab"].__getitem__)
    tokens = list(dict.fromkeys([*_added(state), *by_id]))[:size]
    if len(tokens) < size:
        raise DataError(f"the texts are too few for a vocabulary of {size}: give more, or choose --vocabulary {len(tokens)}")
    ids = {token: i for i, token in enumerate(tokens)}
    merges = [pair for pair in learnt["merges"] if "".join(pair) in ids]
    unknown = state["model"].get("unk_token")
    state["model"] |= {"vocab": ids, "merges": merges, "unk_token": unknown if unknown in ids else None}
    state["added_tokens"] = [{**token, "id": ids[token["content"]]} for token in _by_id(state)]
    state |= {"post_processor": _renumbered(state["post_processor"], ids), "truncation": None, "padding": None}
    new: Tokenizer = Tokenizer.from_str(json.dumps(state))
    new.decoder = decoders.ByteLevel()
    if split := [word for word in whole if len(_spelled(new, word)) > 1]:
        raise DataError(f"a vocabulary of {size} splits the label word {split[0]!r}; choose a larger one")
    return new


def _spelled(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def _by_id(state: Mapping[str, Any]) -> list[dict[str, Any]]:
    return sorted(state["added_tokens"], key=lambda token: int(token["id"]))


def _added(state: Mapping[str, Any]) -> list[str]:
    return [token["content"] for token in _by_id(state)]


def _renumbered(node: Any, ids: Mapping[str, int]) -> Any:
    """A post-processor, of whatever kind, with the new ids of the tokens it names."""
    if isinstance(node, dict) and {"ids", "tokens"} <= node.keys():  # of a template
        return {**node, "ids": [ids[token] for token in node["tokens"]]}
    if isinstance(node, dict):
        return {key: _renumbered(inner, ids) for key, inner in node.items()}
    if isinstance(node, list) and len(node) == 2 and isinstance(node[0], str):  # `sep` and `cls` of BERT's and RoBERTa's
        return [node[0], ids[node[0]]]
    return [_renumbered(inner, ids) for inner in node] if isinstance(node, list) else node


# The model ------------------------------------------------------------------------------------------------------------
def rows(old: Tokenizer, new: Tokenizer, table: Tensor) -> Tensor:
    """The embeddings of the new tokens: (new tokens, width).

    A token of which the old tokenizer cannot spell a single byte gets the mean of all rows.

    Args:
        table: of the old tokens, (V, width); V may be more than there are.
    """
    model, unknown = old.model, getattr(old.model, "unk_token", None)
    without = old.token_to_id(unknown) if unknown else None
    made = table.new_empty(new.get_vocab_size(), table.shape[1])
    middle = table[: old.get_vocab_size()].mean(0)
    for token, i in new.get_vocab().items():
        own = old.token_to_id(token)
        spelled = [own] if own is not None else [piece.id for piece in model.tokenize(token) if piece.id != without]
        there = [j for j in spelled if j < len(table)]
        made[i] = table[there].mean(0) if there else middle
    return made


def swap(model: nn.Module, old: Tokenizer, new: Tokenizer) -> nn.Module:
    """A copy of a llama that reads and writes the new tokenizer's ids, in eval mode; tied tables stay tied.

    The ids in its configuration, and in that of its generation, stand for the same tokens as before; one whose token the new
    tokenizer lacks is left out.
    """
    whole: Any = model
    config = copy.deepcopy(whole.config)
    config.vocab_size = new.get_vocab_size()
    for name, ids in config.to_dict().items():
        if name.endswith("_token_id") and isinstance(ids, list):
            setattr(config, name, [found for i in ids if (found := _follow(i, old, new)) is not None])
        elif name.endswith("_token_id") and ids is not None:
            setattr(config, name, _follow(ids, old, new))
    state = whole.state_dict()
    state |= {name: rows(old, new, state[name]) for name in TABLES}
    with torch.random.fork_rng(devices=[]):
        swapped: nn.Module = type(whole)(config)
    swapped.load_state_dict(state)
    return swapped.eval()


def _follow(i: int, old: Tokenizer, new: Tokenizer) -> int | None:
    """What a token's id becomes."""
    token = old.id_to_token(i) if i >= 0 else None
    found: int | None = None if token is None else new.token_to_id(token)
    return found
