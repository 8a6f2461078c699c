"""Tiny random models of every family the exporter knows, as transformers folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests import factories

SIZES = {
    "vocab_size": 29,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "tie_word_embeddings": True}
DECODERS = ("llama", "qwen2", "gemma3_text")
FAMILIES = (*DECODERS, "bert")


def write(folder: Path, model_type: str, **changes: Any) -> Path:
    """The folder of a random model with grouped-query attention; its weights are the same every time."""
    factories.write_model(folder, "encoder" if model_type == "bert" else "decoder")  # its tokenizer, weights replaced below
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build(model_type, **changes)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "norm" in name.lower():
                    weight.add_(torch.randn_like(weight) * 0.3)  # a norm of ones would hide mistakes
                elif name.endswith("bias"):
                    weight.copy_(torch.randn_like(weight) * 0.1)
                else:
                    weight.mul_(6)  # the usual start is so small that nothing depends on anything
    model.save_pretrained(folder)
    return folder


def write_spelling(folder: Path, size: int) -> Path:
    """A random llama with a tokenizer of its own: byte-level BPE of `size` tokens, of which `<end>`, 2, ends a text.

    Up to 44 tokens it knows parts of the words of `factories` only, from some 120 on all of them.
    """
    words = [*factories.OTHER, *factories.GOOD, *factories.BAD]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<unk>", "<end>"]
    tokenizer.train_from_iterator([f" {w}" for w in words] * 9, trainers.BpeTrainer(vocab_size=size, special_tokens=special))
    write(folder, "llama", vocab_size=tokenizer.get_vocab_size())
    hf: Any = transformers
    names = dict(zip(("pad_token", "unk_token", "eos_token"), special, strict=True))
    hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder


def build(model_type: str, **changes: Any) -> Any:
    hf: Any = transformers
    if model_type == "bert":
        return hf.BertModel(hf.BertConfig(**{**SIZES, **changes}))
    if model_type == "gemma3_text":
        return hf.Gemma3ForCausalLM(
            hf.Gemma3TextConfig(**{**GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8, **changes})
        )
    names = {"llama": "Llama", "qwen2": "Qwen2"}
    name = names[model_type]
    return getattr(hf, f"{name}ForCausalLM")(getattr(hf, f"{name}Config")(**{**GROUPED, **changes}))
