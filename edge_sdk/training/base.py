"""A base model's weights in torch: whole, from its asset (export, baselines), or the top layers alone, out of a bundle."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from edge_sdk.assets import Asset, resolve
from edge_sdk.bundle import CONFIG, FINAL, VOCABULARY, Bundle, layer_file
from edge_sdk.errors import AssetError, DataError
from edge_sdk.tasks import Kind
from edge_sdk.tokens import Ids, pad


# The whole model ------------------------------------------------------------------------------------------------------
def load(bundle: Bundle) -> nn.Module:
    """The fp32 base model of a bundle, in eval mode.

    Raises:
        AssetError: the base could not be had, or does not have the bundle's number of parameters.
    """
    model = load_path(resolve(Asset(bundle.base, bundle.base_sha256)), bundle.kind)
    if (found := count_parameters(model)) != bundle.parameters:
        raise AssetError(f"{bundle.base} has {found} parameters, the bundle was made from {bundle.parameters}")
    return model


def load_path(path: Path, kind: Kind) -> nn.Module:
    """A transformers folder or one GGUF file (dequantized) as a causal LM (decoder) or bare encoder.

    Raises:
        DataError: the weights cannot be read, or some of the model's are missing (transformers would make them up).
    """
    from transformers import AutoModel, AutoModelForCausalLM
    from transformers.utils import logging as chatter

    chatter.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers leaves it untyped
    auto: Any = AutoModelForCausalLM if kind == "decoder" else AutoModel
    where = (path.parent, {"gguf_file": path.name}) if path.suffix == ".gguf" else (path, {"use_safetensors": True})
    try:
        model, found = auto.from_pretrained(where[0], dtype=torch.float32, output_loading_info=True, **where[1])
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise DataError(f"the weights in {path} cannot be read: {str(error).splitlines()[0][:300]}") from error
    absent = sorted({*found["missing_keys"], *(str(key) for key in found["mismatched_keys"])})
    if missing := [name for name in absent if not name.startswith("pooler.")]:
        raise DataError(f"{path} lacks {len(missing)} of the model's weights (first: {missing[0]}); they would be random")
    module: nn.Module = model.eval()
    return module


def count_parameters(model: nn.Module) -> int:
    """Distinct weights; tied ones count once."""
    return sum(p.numel() for p in model.parameters())


def whole_states(model: Any, kind: Kind, sequences: Sequence[Ids]) -> tuple[Tensor, Tensor]:
    """Final hidden states (n, longest, width) of a whole model, PEFT's or not, and the mask (n, longest)."""
    ids, mask = (torch.from_numpy(a) for a in pad(sequences))
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    if kind == "decoder":
        return bare.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state, mask
    return bare(input_ids=ids, attention_mask=mask).last_hidden_state, mask


# The top layers -------------------------------------------------------------------------------------------------------
class _AsItComes(nn.Module):
    """In the place of an encoder's embeddings: what comes in is what the top layers read."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> Tensor:
        return inputs_embeds


class Only(nn.Module):
    """A module computed only at the positions that count; zeros elsewhere.

    In a decoder's last layer nothing but the positions that are read out matters, and all but keys and values is spared.

    Args:
        module: maps (positions, width) to (positions, any width).
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.at: tuple[Tensor, ...] | None = None  # rows and columns; None for every position

    def forward(self, x: Tensor) -> Tensor:
        if self.at is None:
            every: Tensor = self.module(x)
            return every
        found: Tensor = self.module(x[self.at])
        return found.new_zeros(*x.shape[:2], found.shape[-1]).index_put(self.at, found)


def spare(model: Any) -> list[Only]:
    """Puts `Only` around what the last layer of a bare decoder need not compute everywhere, where it is built as usual."""
    layer, made = model.layers[-1], []
    for holder, name in ((layer, "mlp"), (layer.self_attn, "q_proj"), (layer.self_attn, "o_proj")):
        if isinstance(inner := getattr(holder, name, None), nn.Module):
            made.append(Only(inner))
            setattr(holder, name, made[-1])
    return made


def load_top(folder: Path, bundle: Bundle, layers: int) -> nn.Module:
    """The `layers` layers nearest the output and what follows them, fp32, in eval mode; reads `inputs_embeds`.

    Args:
        folder: a bundle with the files of `bundle.trains(layers)`, verified.

    Raises:
        DataError: the files do not fit each other, or this transformers.
    """
    from transformers import AutoConfig, AutoModel

    bundle.trains(layers)
    auto: Any = AutoModel
    try:
        config: Any = AutoConfig.from_pretrained(folder / CONFIG)
        config.num_hidden_layers, config.vocab_size, config.pad_token_id = layers, 1, None
        if getattr(config, "layer_types", None):  # which layers have a window
            config.layer_types = config.layer_types[-layers:]
        model: Any = auto.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
        if bundle.kind == "encoder":
            model.embeddings, model.pooler = _AsItComes(), None
        for i, layer in enumerate(model.get_submodule(_inside(bundle))):  # one at a time: twice all of them is a lot
            layer.load_state_dict(load_file(folder / layer_file(bundle.layers - layers + i)))
        if final := load_file(folder / FINAL):
            model.norm.load_state_dict(final)
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError, SafetensorError) as error:
        raise DataError(f"the layers in {folder} cannot be trained: {' '.join(str(error).split())[:300]}") from error
    module: nn.Module = model
    return module


def inside(bundle: Bundle, layers: int, module: str) -> str:
    """Where a module of the base is in `load_top`'s model: `model.layers.25.self_attn.q_proj` -> `layers.5.self_attn.q_proj`."""
    index, rest = module.removeprefix(f"{bundle.layers_path}.").split(".", 1)
    return f"{_inside(bundle)}.{int(index) - (bundle.layers - layers)}.{rest}"


def _inside(bundle: Bundle) -> str:
    """The list of layers, seen from the bare model: a causal LM holds it as `model`."""
    return bundle.layers_path.removeprefix("model.") if bundle.kind == "decoder" else bundle.layers_path


def load_vocabulary(folder: Path) -> Tensor:
    """A decoder's output embeddings (V, width), fp32."""
    table: Tensor = load_file(folder / VOCABULARY)["weight"].float()
    return table


def quiet() -> None:
    """Keeps transformers from warning of what is meant to be."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
