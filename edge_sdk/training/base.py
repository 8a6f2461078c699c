"""Loads a base model's original weights into torch, from whatever its asset reference points at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from edge_sdk.assets import Asset, resolve
from edge_sdk.bundle import Bundle
from edge_sdk.errors import AssetError
from edge_sdk.tasks import Kind


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
    """A transformers folder or one GGUF file (dequantized) as a causal LM (decoder) or bare encoder."""
    from transformers import AutoModel, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers leaves it untyped
    auto: Any = AutoModelForCausalLM if kind == "decoder" else AutoModel
    if path.suffix == ".gguf":
        model = auto.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    else:
        model = auto.from_pretrained(path, dtype=torch.float32, use_safetensors=True)
    module: nn.Module = model.eval()
    return module


def count_parameters(model: nn.Module) -> int:
    """Distinct weights; tied ones count once."""
    return sum(p.numel() for p in model.parameters())
