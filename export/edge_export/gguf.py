"""A transformers folder -> one GGUF file for llama.cpp, in numpy. No torch.

Devices tokenize with the bundle's `tokenizer.json` and pass token ids only; a byte-level BPE vocabulary is written all the
same, so that other programs can use the file.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from edge_sdk.engines.gguf_adapter import PERMUTED, reorder, tensor_names
from edge_sdk.errors import DataError

Config = Mapping[str, Any]

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "gemma3_text": "gemma3"}
NUMPY = ("f16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1")
K_QUANTS = {"q4_k_m": "Q4_K_M", "q5_k_m": "Q5_K_M", "q6_k": "Q6_K"}
QUANTS = (*NUMPY, *K_QUANTS)
_EMBEDDINGS = ("token_embd.weight", "output.weight")
_SENSITIVE = (".attn_v.weight", ".attn_output.weight")
_FAMILIES = (("{1,3}", "llama-bpe"), ("\\p{N}", "qwen2"), ("Digits", "smollm"))


def write(plain: Path, out: Path, quant: str) -> None:
    """Writes the model of a transformers folder of fp32 weights as a GGUF file, whole or not at all.

    Args:
        plain: holds `config.json`, `model.safetensors` and `tokenizer.json`.
        quant: one of `QUANTS`.

    Raises:
        DataError: the folder cannot be read, or its architecture or the quantization is not supported.
    """
    if quant not in QUANTS:
        raise DataError(f"no GGUF quantization {quant!r}; choose one of: {', '.join(QUANTS)}")
    config = _config(plain)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".gguf-") as work:
        made = Path(work) / "model.gguf"
        _write(plain, config, made, quant if quant in NUMPY else "f16")
        if quant in K_QUANTS:
            made = _requantize(made, quant)
        made.replace(out)


def _config(plain: Path) -> Config:
    try:
        config: Config = json.loads((plain / "config.json").read_text())
        found = config["model_type"]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{plain} is not a transformers folder ({error!r})") from error
    if found not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise DataError(f"a {found!r} model cannot be written as GGUF; supported are: {known}. Choose an ONNX variant")
    return config


def _write(plain: Path, config: Config, out: Path, quant: str) -> None:
    writer: Any = gguf.GGUFWriter(out, ARCHITECTURES[config["model_type"]])
    try:
        _describe(writer, config, quant)
        _describe_rope(writer, config)
        _add_tokenizer(writer, plain, config)
        for name, array in _tensors(plain, config):
            kind = _kind(name, array, quant)
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _kind(name: str, array: NDArray[np.float32], quant: str) -> Any:
    """How a tensor is stored.

    Token embeddings, which a tied model also ranks words with, keep at least 8 bits. With 8 bits the values' path through
    attention is what hurts most, and stays f16: 9 % more bytes for a third less disagreement (docs/LOG.md).
    """
    kinds = gguf.GGMLQuantizationType
    if array.ndim == 1:
        return kinds.F32
    kind = kinds[quant.upper()]
    if name in _EMBEDDINGS and quant != "f16":
        kind = kinds.Q8_0
    if quant == "q8_0" and any(part in name for part in _SENSITIVE):
        kind = kinds.F16
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    return kind if array.shape[-1] % block == 0 else kinds.F16


def _head_width(config: Config) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _describe(writer: Any, config: Config, quant: str) -> None:
    """Sizes, as llama.cpp asks for them."""
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{quant.upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config.get("num_key_value_heads") or config["num_attention_heads"])
    writer.add_key_length(_head_width(config))
    writer.add_value_length(_head_width(config))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    if config["model_type"] == "gemma3_text":
        _describe_gemma(writer, config)
    if config.get("use_sliding_window"):
        raise DataError("a model with use_sliding_window cannot be written as GGUF; choose an ONNX variant")


def _describe_gemma(writer: Any, config: Config) -> None:
    if config.get("query_pre_attn_scalar", _head_width(config)) != _head_width(config):
        raise DataError("a gemma3 model whose query_pre_attn_scalar is not its head_dim cannot be written as GGUF")
    if config.get("final_logit_softcapping") or config.get("attn_logit_softcapping"):
        raise DataError("a gemma3 model with logit softcapping cannot be written as GGUF")
    writer.add_sliding_window(config["sliding_window"])
    writer.add_sliding_window_pattern(_period(config))
    writer.add_rope_freq_base_swa(float(_rope(config, "sliding_attention").get("rope_theta", 10_000.0)))


def _period(config: Config) -> int:
    """Every how many layers one reads everything; the others see a window."""
    layers = config["num_hidden_layers"]
    types = config.get("layer_types")
    if types is None:
        return int(config.get("sliding_window_pattern", 6))
    period = types.index("full_attention") + 1 if "full_attention" in types else layers + 1
    if any((kind == "full_attention") != ((i + 1) % period == 0) for i, kind in enumerate(types)):
        raise DataError("gemma3 layers of full attention must come at even distances to be written as GGUF")
    return int(period)


def _rope(config: Config, layers: str = "full_attention") -> Config:
    """Settings of the rotary positions, which transformers 4 and 5 write in different places."""
    given: Config = config.get("rope_parameters") or {}
    given = given.get(layers, given)
    if given:
        return given
    if layers == "sliding_attention":
        return {"rope_theta": config.get("rope_local_base_freq", 10_000.0)}
    return {"rope_theta": config.get("rope_theta", 10_000.0), **(config.get("rope_scaling") or {})}


def _describe_rope(writer: Any, config: Config) -> None:
    rope = _rope(config)
    writer.add_rope_dimension_count(_head_width(config))
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    scaling = rope.get("rope_type", rope.get("type", "default"))
    if scaling == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif scaling not in ("default", "llama3"):
        raise DataError(f"rope scaling {scaling!r} cannot be written as GGUF; supported are: linear, llama3")


def _tensors(plain: Path, config: Config) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """GGUF name and values of every weight."""
    architecture = ARCHITECTURES[config["model_type"]]
    names = tensor_names(architecture, config["num_hidden_layers"])
    heads, kv_heads = config["num_attention_heads"], config.get("num_key_value_heads") or config["num_attention_heads"]
    rotary = _rope_factors(config)
    if rotary is not None:
        yield "rope_freqs.weight", rotary
    for source, array in _weights(plain, bool(config.get("tie_word_embeddings", True))):
        name: str | None = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise DataError(f"{source} has no place in a GGUF file of architecture {architecture!r}; choose an ONNX variant")
        if architecture == "gemma3" and source.endswith("norm.weight"):
            array = array + np.float32(1)  # transformers keeps the difference to one
        yield name, reorder(name, array, heads, kv_heads) if architecture in PERMUTED else array


def _weights(plain: Path, tied: bool) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Every weight but a tied output head, which llama.cpp takes from the embeddings."""
    seen: set[str] = set()
    files = sorted(plain.glob("model*.safetensors"))
    try:
        for path in files:
            with safe_open(path, "np") as tensors:
                for name in tensors.keys():  # noqa: SIM118  # no mapping
                    seen.add(name)
                    if not (tied and name == "lm_head.weight"):
                        yield name, np.asarray(tensors.get_tensor(name), np.float32)
    except (OSError, SafetensorError, TypeError) as error:
        raise DataError(f"{plain} has no readable weights ({error!r}); save them as float32 safetensors") from error
    if not files or not (tied or "lm_head.weight" in seen):
        raise DataError(f"{plain} has no {'lm_head.weight' if files else 'model.safetensors'}; save the whole causal LM")


def _rope_factors(config: Config) -> NDArray[np.float32] | None:
    """Llama 3's factors on the rotary wavelengths: long ones are stretched, short ones stay, those between are mixed."""
    rope = _rope(config)
    if rope.get("rope_type", rope.get("type")) != "llama3":
        return None
    width, original = _head_width(config), rope["original_max_position_embeddings"]
    waves = 2 * math.pi * float(rope["rope_theta"]) ** (np.arange(0, width, 2) / width)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = np.clip((original / waves - low) / (high - low), 0, 1)
    return np.asarray(1 / ((1 - smooth) / rope["factor"] + smooth), np.float32)


def _add_tokenizer(writer: Any, plain: Path, config: Config) -> None:
    """A byte-level BPE vocabulary, or none; the end tokens in either case."""
    try:
        tokenizer = json.loads((plain / "tokenizer.json").read_text())
        model = tokenizer["model"]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{plain} has no readable tokenizer.json ({error!r})") from error
    if model.get("type") == "BPE" and '"ByteLevel"' in json.dumps(tokenizer.get("pre_tokenizer")):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_family(tokenizer))
        tokens, types = _vocabulary(tokenizer, config["vocab_size"])
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
    else:
        writer.add_tokenizer_model("none")
    _add_special(writer, config)


def _family(tokenizer: Mapping[str, Any]) -> str:
    """llama.cpp's name for how a tokenizer splits text before its merges, told by how it treats digits."""
    splits = json.dumps(tokenizer["pre_tokenizer"], ensure_ascii=False)
    return next((name for mark, name in _FAMILIES if json.dumps(mark)[1:-1] in splits), "default")


def _vocabulary(tokenizer: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Token strings and types by id; ids that only pad the embedding matrix are unused."""
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [int(gguf.TokenType.UNUSED)] * size
    found = [(i, token, gguf.TokenType.NORMAL) for token, i in tokenizer["model"]["vocab"].items()]
    for added in tokenizer.get("added_tokens", []):
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        found.append((added["id"], added["content"], kind))
    for i, token, kind in found:
        if i < size:  # some tokenizers know tokens that the model has no row for
            tokens[i], types[i] = token, int(kind)
    return tokens, types


def _add_special(writer: Any, config: Config) -> None:
    bos, eos = config.get("bos_token_id"), config.get("eos_token_id")
    ends = [eos] if isinstance(eos, int) else list(eos or ())
    if bos is not None:
        writer.add_bos_token_id(bos)
    if ends:
        writer.add_eos_token_id(ends[0])
    if len(ends) > 1:
        writer.add_eot_token_id(ends[1])
    writer.add_add_bos_token(False)  # the bundle says what a sequence starts with


def _requantize(source: Path, quant: str) -> Path:
    """K-quants, which only llama.cpp itself can write."""
    try:
        import llama_cpp
    except ModuleNotFoundError as error:
        raise DataError(f"writing {quant} needs llama.cpp: pip install 'tandem-edge[gguf]', or choose q8_0 or q5_1") from error
    library: Any = llama_cpp
    out = source.with_name("quantized.gguf")
    params = library.llama_model_quantize_default_params()
    params.ftype = getattr(library, f"LLAMA_FTYPE_MOSTLY_{K_QUANTS[quant]}")
    code = library.llama_model_quantize(str(source).encode(), str(out).encode(), params)
    if code:
        raise DataError(f"llama.cpp could not write {quant} (code {code}); choose q8_0 or q5_1")
    return out
