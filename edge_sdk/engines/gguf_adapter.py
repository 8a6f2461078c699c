"""LoRA arrays under PEFT's names -> the adapter file llama.cpp loads. numpy and `gguf` only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from edge_sdk.adapters import Adapter, Slot
from edge_sdk.errors import DataError

PERMUTED = ("llama",)  # architectures whose query and key rows a GGUF file holds in another order


def write(path: Path, adapter: Adapter, architecture: str, heads: int, kv_heads: int, layers: int) -> None:
    """Writes an adapter file for a base of this architecture; alpha / rank is already multiplied into B.

    Args:
        architecture: `general.architecture` of the base's GGUF file.
        heads: attention heads of the base; kv_heads: those of its keys and values.
        layers: how many transformer layers the base has.

    Raises:
        DataError: the architecture has no tensor for one of the adapter's modules.
    """
    names = tensor_names(architecture, layers)
    writer: Any = gguf.GGUFWriter(path, architecture)
    try:
        _describe(writer)
        for slot in adapter.spec.slots:
            stem = _tensor(names, slot, architecture)
            b = adapter.arrays[slot.b] * np.float32(adapter.spec.scaling)
            if architecture in PERMUTED:
                b = reorder(stem, b, heads, kv_heads)
            writer.add_tensor(f"{stem}.lora_a", np.ascontiguousarray(adapter.arrays[slot.a], np.float32))
            writer.add_tensor(f"{stem}.lora_b", np.ascontiguousarray(b, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _describe(writer: Any) -> None:
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)  # 0: llama.cpp takes A and B as they are


def tensor_names(architecture: str, layers: int) -> Any:
    """gguf's table of tensor names for an architecture.

    Raises:
        DataError: gguf does not know the architecture.
    """
    for arch, name in gguf.MODEL_ARCH_NAMES.items():
        if name == architecture:
            return gguf.get_tensor_name_map(arch, layers)
    raise DataError(f"the gguf package knows no architecture {architecture!r}; install a newer gguf")


def _tensor(names: Any, slot: Slot, architecture: str) -> str:
    found: str | None = names.get_name(f"{slot.module}.weight", try_suffixes=(".weight",))
    if found is None:
        raise DataError(f"{slot.module} has no tensor in a GGUF file of architecture {architecture!r}; train other layers")
    return found


def reorder(name: str, rows: NDArray[Any], heads: int, kv_heads: int) -> NDArray[Any]:
    """Query and key rows in llama.cpp's order: the two halves of each head, which rotate together, interleaved.

    Args:
        name: of the GGUF tensor; other tensors than queries and keys stay as they are.
        rows: weight, bias or lora_B; the first axis is the layer's output.
    """
    if ".attn_q." in name:
        count = heads
    elif ".attn_k." in name:
        count = kv_heads
    else:
        return rows
    return rows.reshape(count, 2, len(rows) // count // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
