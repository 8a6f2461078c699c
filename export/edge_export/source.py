"""What transformers and optimum know of a model: its configuration, its tokenizer, its fp32 graph."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import onnx

from edge_export.graph import Rotary
from edge_sdk.errors import AssetError, DataError
from edge_sdk.tasks import Kind


def config_of(source: Path) -> Any:
    """Raises: DataError: transformers cannot read it."""
    from transformers import AutoConfig

    auto: Any = AutoConfig
    try:
        return _from(auto, source)
    except (OSError, ValueError, KeyError) as error:
        said = str(error).splitlines()[0]
        raise DataError(f"{source} is not a model that transformers can read ({said})") from error


def tokenizer_of(source: Path) -> Any:
    """Raises: DataError: there is none that a device can read."""
    from transformers import AutoTokenizer

    try:
        tokenizer = _from(AutoTokenizer, source)
    except Exception as error:  # transformers fails in many ways where files are missing
        raise DataError(f"{source} has no tokenizer that transformers can read ({str(error).splitlines()[0][:200]})") from error
    if not tokenizer.is_fast:
        raise DataError(f"{source} has no fast tokenizer, and a device reads only tokenizer.json")
    return tokenizer


def _from(auto: Any, source: Path) -> Any:
    if source.suffix == ".gguf":
        return auto.from_pretrained(source.parent, gguf_file=source.name)
    return auto.from_pretrained(source)


def frame(tokenizer: Any, kind: Kind, gguf: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Token ids before and after every sequence: [CLS] and [SEP] of an encoder; BOS of a decoder whose tokenizer adds it.

    A tokenizer out of a GGUF file adds BOS to everything, whatever the model was trained with, so there it stays out.
    """
    if kind == "encoder":
        return (tokenizer.cls_token_id,), (tokenizer.sep_token_id,)
    added = [] if gguf else tokenizer("").input_ids
    return ((tokenizer.bos_token_id,) if tokenizer.bos_token_id in added else ()), ()


def end_of_text(config: Any, tokenizer: Any) -> tuple[int, ...]:
    """Ids that end a text, of the configuration and of the tokenizer."""
    named = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    return tuple(sorted({int(i) for i in [*named, tokenizer.eos_token_id] if i is not None}))


def rotary_of(model: Any) -> Rotary | None:
    """What the fused attention needs; None where the attention is not plain rotary and causal."""
    config, inner = model.config, model.model.rotary_emb
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    if inner.rope_type not in ("default", "linear", "llama3") or windowed:
        return None
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    frequencies = inner.inv_freq.detach().numpy()
    return Rotary(config.num_attention_heads, config.num_key_value_heads, size, frequencies, float(inner.attention_scaling))


def export(plain: Path, kind: Kind, folder: Path) -> onnx.ModelProto:
    """The graph optimum makes of a transformers folder: fp32, with caches for a decoder."""
    try:
        from optimum.exporters.onnx import main_export
    except ImportError as error:
        raise AssetError("exporting needs the export extra: pip install 'tandem-edge[export]'") from error
    from optimum.utils import logging as chatter
    from transformers.utils import logging

    chatter.set_verbosity_error()  # what both warn of is for the people who write exporters
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    task = "text-generation-with-past" if kind == "decoder" else "feature-extraction"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's constants are constants; `_same` compares the graph with torch
        main_export(str(plain), output=folder, task=task, do_validation=False, library_name="transformers")
    return onnx.load(folder / "model.onnx")
