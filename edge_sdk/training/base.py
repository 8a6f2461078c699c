"""Loads a base model's original weights into torch, from whatever its asset reference points at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from edge_sdk.assets import Asset, resolve
from edge_sdk.bundle import Bundle
from edge_sdk.errors import AssetError, DataError
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
    """A transformers folder or one GGUF file (dequantized) as a causal LM (decoder) or bare encoder.

    Raises:
        DataError: the weights cannot be read, or some of the model's are missing (transformers would make them up).
    """
    from transformers import AutoModel, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers leaves it untyped
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
