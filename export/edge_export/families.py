"""What the exporter knows of each model family: where scales can be folded, and which layers share an input. Pure data."""

from __future__ import annotations

from dataclasses import dataclass

from edge_sdk.errors import DataError
from edge_sdk.tasks import Kind


@dataclass(frozen=True)
class Group:
    """Linear layers of one transformer layer that read the same input, and what writes that input.

    Args:
        sinks: module paths inside the layer.
        source: module whose output channels can be scaled down while the sinks' columns are scaled up, which changes
            nothing in exact arithmetic; "" where there is none.
        offset: added to a norm's weight in the forward pass (Gemma multiplies by 1 + weight).
    """

    sinks: tuple[str, ...]
    source: str = ""
    offset: float = 0.0


@dataclass(frozen=True)
class Family:
    """Where a family keeps its layers.

    Args:
        kind: how the model is read out.
        layers: path of the list of layers.
        groups: the linear layers of each, by shared input.
        final: the module between the last layer and the readout; "" where there is none.
        slots: last parts of the modules that get LoRA unless others are named.
        plain_attention: attention is rotary and causal, with nothing between the projections and the rotation, so that
            the exported graph's many small operators can be replaced by one.
    """

    kind: Kind
    layers: str
    groups: tuple[Group, ...]
    slots: tuple[str, ...]
    final: str = ""
    plain_attention: bool = False


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_MLP = ("mlp.gate_proj", "mlp.up_proj")
_LLAMA = Family(
    "decoder",
    "model.layers",
    (
        Group(_QKV, "input_layernorm"),
        Group(("self_attn.o_proj",), "self_attn.v_proj"),
        Group(_MLP, "post_attention_layernorm"),
        Group(("mlp.down_proj",), "mlp.up_proj"),
    ),
    ("q_proj", "v_proj"),
    final="model.norm",
    plain_attention=True,
)
_GEMMA3 = Family(
    "decoder",
    "model.layers",
    (
        Group(_QKV, "input_layernorm", offset=1.0),
        Group(("self_attn.o_proj",), "self_attn.v_proj"),
        Group(_MLP, "pre_feedforward_layernorm", offset=1.0),
        Group(("mlp.down_proj",), "mlp.up_proj"),
    ),
    ("q_proj", "v_proj"),
    final="model.norm",
)
_BERT = Family(  # its norms feed the residual stream too, so only the values' scales can be folded
    "encoder",
    "encoder.layer",
    (
        Group(("attention.self.query", "attention.self.key", "attention.self.value")),
        Group(("attention.output.dense",), "attention.self.value"),
        Group(("intermediate.dense",)),
        Group(("output.dense",)),
    ),
    ("query", "value"),
)
FAMILIES = {"llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA, "gemma3_text": _GEMMA3, "bert": _BERT}


def family_of(model_type: str) -> Family:
    """Raises: DataError: nobody has taught the exporter this family; lists those it knows."""
    if model_type not in FAMILIES:
        raise DataError(f"model type {model_type!r} is not supported; supported: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]
