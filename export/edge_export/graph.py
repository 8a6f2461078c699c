"""Surgery on exported ONNX graphs: LoRA as optional inputs, a readout instead of logits, one attention operator a layer.

onnx only, no torch. Adapter arrays enter under their PEFT names and in PEFT's orientation, A (rank, in) and B (out, rank)
with alpha / rank already multiplied into B. Their default is rank 0, which adds nothing, so a graph without feeds is the
base model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from edge_sdk.adapters import Slot
from edge_sdk.errors import DataError

Scales = Mapping[str, NDArray[np.float32]]
NONE: Scales = {}
OPSET = 23  # the first with Attention and RotaryEmbedding
IR = 10  # what older runtimes still read
MINIMUM = "1.23"  # ONNX Runtime that knows this opset


def dotted(node: NodeProto) -> str:
    """`/encoder/layer.0/attention/self/query/MatMul` -> `encoder.layer.0.attention.self.query.MatMul`."""
    return str(node.name).strip("/").replace("/", ".")


def module_of(node: NodeProto) -> str | None:
    """The module path of a linear layer's MatMul; None for other nodes."""
    name = dotted(node)
    return name.removesuffix(".MatMul") if node.op_type == "MatMul" and name.endswith(".MatMul") else None


def constant(graph: GraphProto, name: str, value: Any) -> str:
    """Adds an initializer; returns its name."""
    graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return name


def set_opset(model: ModelProto) -> None:
    """Declares the opset our own nodes need; the operators optimum writes mean the same in both."""
    del model.opset_import[:]
    model.opset_import.extend([helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)])
    model.ir_version = IR


# LoRA -----------------------------------------------------------------------------------------------------------------
def add_lora(graph: GraphProto, modules: Iterable[str], columns: Scales = NONE, rows: Scales = NONE) -> tuple[Slot, ...]:
    """Adds x A^T B^T to the output of every linear layer whose module path ends in one of `modules`.

    Args:
        columns: module -> what smoothing divided its input by, (in_features,); A is multiplied by it in the graph.
        rows: module -> what smoothing divided its output by, (out_features,); B's rows are divided by it.

    Raises:
        DataError: a name matches no MatMul with a constant weight.
    """
    weights = {w.name: tuple(w.dims) for w in graph.initializer}
    wanted = tuple(modules)
    slots: list[Slot] = []
    for node in list(graph.node):
        module = module_of(node)
        if module is None or node.input[1] not in weights or not any(module.endswith(f".{m}") for m in wanted):
            continue
        n_in, n_out = weights[node.input[1]]
        slot = Slot(module, n_in, n_out)
        _insert(graph, node, slot, columns.get(module), rows.get(module))
        slots.append(slot)
    for name in wanted:
        if not any(slot.module.endswith(f".{name}") for slot in slots):
            raise DataError(f"the exported graph has no linear layer named {name!r}")
    return tuple(slots)


def _insert(
    graph: GraphProto, node: NodeProto, slot: Slot, columns: NDArray[np.float32] | None, rows: NDArray[np.float32] | None
) -> None:
    stem = f"/lora/{slot.module}"
    result = node.output[0]
    node.output[0] = f"{stem}/base"
    added: list[NodeProto] = []

    def scaled(name: str, by: NDArray[np.float32] | None, letter: str) -> str:
        if by is None:
            return name
        factor = constant(graph, f"{stem}/scale{letter}", by.astype(np.float32))
        added.append(helper.make_node("Mul", [name, factor], [f"{stem}/{letter}"], name=f"{stem}/Scale{letter}"))
        return f"{stem}/{letter}"

    a = scaled(slot.a, columns, "A")
    b = scaled(slot.b, None if rows is None else np.float32(1) / rows[:, None], "B")
    added += [
        helper.make_node("Transpose", [a], [f"{stem}/At"], name=f"{stem}/TransposeA", perm=[1, 0]),
        helper.make_node("Transpose", [b], [f"{stem}/Bt"], name=f"{stem}/TransposeB", perm=[1, 0]),
        helper.make_node("MatMul", [node.input[0], f"{stem}/At"], [f"{stem}/xA"], name=f"{stem}/MatMulA"),
        helper.make_node("MatMul", [f"{stem}/xA", f"{stem}/Bt"], [f"{stem}/delta"], name=f"{stem}/MatMulB"),
        helper.make_node("Add", [f"{stem}/base", f"{stem}/delta"], [result], name=f"{stem}/Add"),
    ]
    at = list(graph.node).index(node) + 1
    for offset, new in enumerate(added):
        graph.node.insert(at + offset, new)
    rank = f"rank {slot.module}"  # its own: equal names mean equal sizes, and an adapter may leave slots out
    for name, empty, shape in (
        (slot.a, (0, slot.in_features), [rank, slot.in_features]),
        (slot.b, (slot.out_features, 0), [slot.out_features, rank]),
    ):
        constant(graph, name, np.zeros(empty, np.float32))
        graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))


# Readout --------------------------------------------------------------------------------------------------------------
def decoder_readout(graph: GraphProto) -> None:
    """Makes a causal LM end in what devices ask for; a run computes only the outputs it names.

    `readout` (batch, width): the final hidden state at each sequence's last real token. `rows` (labels, width): the output
    embeddings of the input `label_ids`. `logits` (batch, vocabulary): scores of all next tokens. The caches `present.*`
    stay as they are.

    Raises:
        DataError: the output head is missing, or is not a MatMul on a constant weight.
    """
    weights = {w.name: w for w in graph.initializer}
    made_by = {output: node for node in graph.node for output in node.output}
    head = made_by[graph.output[0].name]
    table = _vocabulary(graph, head, made_by, weights)
    hidden, (size, width) = head.input[0], weights[table].dims if table in weights else _dims(graph, table)
    graph.node.remove(head)
    zero = constant(graph, "/readout/zero", np.array(0, np.int64))
    one = constant(graph, "/readout/one", np.array(1, np.int64))
    axis = constant(graph, "/readout/axis", np.array([1], np.int64))
    graph.node.extend(
        [
            helper.make_node("ReduceSum", ["attention_mask", axis], ["/readout/total"], keepdims=1, name="/readout/ReduceSum"),
            helper.make_node("Shape", ["past_key_values.0.key"], ["/readout/shape"], start=2, end=3, name="/readout/Shape"),
            helper.make_node("Sub", ["/readout/total", "/readout/shape"], ["/readout/length"], name="/readout/Length"),
            helper.make_node("Sub", ["/readout/length", one], ["/readout/last"], name="/readout/Last"),
            helper.make_node("Max", ["/readout/last", zero], ["/readout/at"], name="/readout/At"),
            helper.make_node("GatherND", [hidden, "/readout/at"], ["readout"], batch_dims=1, name="/readout/GatherND"),
            helper.make_node("Gather", [table, "label_ids"], ["rows"], axis=0, name="/head/rows/Gather"),
            helper.make_node("Transpose", [table], ["/head/columns"], perm=[1, 0], name="/head/Transpose"),
            helper.make_node("MatMul", ["readout", "/head/columns"], ["logits"], name="/head/Project"),
        ]
    )
    graph.input.append(helper.make_tensor_value_info("label_ids", TensorProto.INT64, ["labels"]))
    caches = [output for output in graph.output if output.name.startswith("present.")]
    _outputs(graph, readout=["batch", width], rows=["labels", width], logits=["batch", size])
    graph.output.extend(caches)


def _vocabulary(graph: GraphProto, head: NodeProto, made_by: Mapping[str, NodeProto], weights: Mapping[str, TensorProto]) -> str:
    """Name of the output embeddings (vocabulary, width): the input embeddings where both are the same numbers."""
    source = made_by.get(head.input[1]) if head.op_type == "MatMul" else None
    if source is not None and source.op_type == "Transpose" and source.input[0] in weights:
        return str(source.input[0])
    if head.op_type != "MatMul" or head.input[1] not in weights:
        raise DataError("the exported causal LM has no linear output head; only models that end in one can be bundled")
    columns = numpy_helper.to_array(weights[head.input[1]])
    for node in graph.node:
        table = weights.get(node.input[0]) if node.op_type == "Gather" else None
        if table is not None and tuple(table.dims) == columns.T.shape and (numpy_helper.to_array(table) == columns.T).all():
            return str(table.name)
    return constant(graph, "lm_head.weight", np.ascontiguousarray(columns.T))


def _dims(graph: GraphProto, name: str) -> tuple[int, ...]:
    return next(tuple(w.dims) for w in graph.initializer if w.name == name)


def encoder_readout(graph: GraphProto, width: int) -> None:
    """Ends an encoder at the unit-length mean over real tokens: `readout` (batch, width)."""
    hidden = graph.output[0].name
    for name, value in (("/readout/axis", [1]), ("/readout/last", [2])):
        constant(graph, name, np.array(value, np.int64))
    constant(graph, "/readout/tiny", np.array(1e-12, np.float32))
    graph.node.extend(
        [
            helper.make_node("Cast", ["attention_mask"], ["/readout/mask"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["/readout/mask", "/readout/last"], ["/readout/mask3"]),
            helper.make_node("Mul", [hidden, "/readout/mask3"], ["/readout/masked"]),
            helper.make_node("ReduceSum", ["/readout/masked", "/readout/axis"], ["/readout/sum"], keepdims=0),
            helper.make_node("Mul", ["/readout/sum", "/readout/sum"], ["/readout/square"]),
            helper.make_node("ReduceSum", ["/readout/square", "/readout/axis"], ["/readout/norm2"], keepdims=1),
            helper.make_node("Sqrt", ["/readout/norm2"], ["/readout/norm"]),
            helper.make_node("Max", ["/readout/norm", "/readout/tiny"], ["/readout/divisor"]),
            helper.make_node("Div", ["/readout/sum", "/readout/divisor"], ["readout"]),
        ]
    )
    _outputs(graph, readout=["batch", width])


def _outputs(graph: GraphProto, **outputs: Sequence[str | int]) -> None:
    del graph.output[:]
    for name, shape in outputs.items():
        graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))


def expose_hidden(graph: GraphProto, layers: Sequence[str], width: int) -> None:
    """Adds outputs `hidden.i` (batch, sequence, width), what enters each layer, where split training may start.

    Args:
        layers: module paths of the layers, from the input to the output.
    """
    for index, layer in enumerate(layers):
        name = f"hidden.{index}"
        graph.node.append(helper.make_node("Identity", [entering(graph, layer)], [name], name=f"/hidden/{index}"))
        graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "sequence", width]))


def entering(graph: GraphProto, module: str) -> str:
    """The tensor that the nodes of `module` read: the first input of the first of them."""
    inside = [node for node in graph.node if dotted(node).startswith(f"{module}.") and node.op_type != "Constant"]
    made_inside = {out for node in graph.node if dotted(node).startswith(f"{module}.") for out in node.output}
    known = {w.name for w in graph.initializer}
    for node in inside:
        for name in node.input:
            if name and name not in made_inside and name not in known:
                return str(name)
    raise DataError(f"the exported graph has no module named {module!r}")


# Attention ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Rotary:
    """Grouped-query attention with rotary positions (Su et al. 2021): sizes, and frequencies (head_size / 2,).

    `strength` multiplies cosines and sines (1 but for some long-context models).
    """

    heads: int
    kv_heads: int
    head_size: int
    frequencies: NDArray[np.float32]
    strength: float


def fuse_attention(graph: GraphProto, layers: Sequence[str], rotary: Rotary) -> None:
    """Puts ONNX's own RotaryEmbedding and Attention in the place of the tracer's 100 nodes a layer.

    Args:
        layers: module path of each layer's attention, which holds `q_proj`, `k_proj`, `v_proj` and `o_proj`.
    """
    _angles(graph, rotary)
    for index, layer in enumerate(layers):
        nodes = {dotted(node): node for node in graph.node}
        stem = f"/{layer}"
        q, k, v = (_leaving(nodes, f"{layer}.{name}_proj") for name in "qkv")
        out = nodes[f"{layer}.o_proj.MatMul"]
        new = [
            helper.make_node("RotaryEmbedding", [q, "/rotary/cos", "/rotary/sin"], [f"{stem}/q"], num_heads=rotary.heads),
            helper.make_node("RotaryEmbedding", [k, "/rotary/cos", "/rotary/sin"], [f"{stem}/k"], num_heads=rotary.kv_heads),
            helper.make_node(
                "Attention",
                [f"{stem}/q", f"{stem}/k", v, "/rotary/mask", *(f"past_key_values.{index}.{n}" for n in ("key", "value"))],
                [f"{stem}/mixed", f"present.{index}.key", f"present.{index}.value"],
                q_num_heads=rotary.heads,
                kv_num_heads=rotary.kv_heads,
            ),
        ]
        for node, kind in zip(new, ("RotateQ", "RotateK", "Attention"), strict=True):
            node.name = f"{stem}/{kind}"
        for old in [n for n in graph.node if any(o.startswith(f"present.{index}.") for o in n.output)]:
            for at, output in enumerate(old.output):
                if output.startswith("present."):
                    old.output[at] = f"{output}/traced"
        place = list(graph.node).index(out)
        for offset, node in enumerate(new):
            graph.node.insert(place + offset, node)
        for node in graph.node:  # the output projection, and a LoRA branch beside it
            for at, name in enumerate(node.input):
                if name == out.input[0] and node is not out:
                    node.input[at] = f"{stem}/mixed"
        out.input[0] = f"{stem}/mixed"


def _leaving(nodes: Mapping[str, NodeProto], module: str) -> str:
    """What a projection gives after its LoRA branch and its bias."""
    for last in (f"{module}.Add", f"lora.{module}.Add", f"{module}.MatMul"):
        if last in nodes:
            return str(nodes[last].output[0])
    raise DataError(f"the exported graph has no linear layer named {module!r}")


def _angles(graph: GraphProto, rotary: Rotary) -> None:
    """cos and sin (batch, sequence, head_size / 2) of positions, and which keys each position may see, at the graph's head."""
    constant(graph, "/rotary/frequencies", rotary.frequencies.astype(np.float32)[None, None, :])
    constant(graph, "/rotary/strength", np.array(rotary.strength, np.float32))
    for name, value in (("zero", 0), ("one", 1), ("first", [1]), ("last", [2])):
        constant(graph, f"/rotary/{name}", np.array(value, np.int64))
    make = helper.make_node
    nodes = [
        make("Unsqueeze", ["position_ids", "/rotary/last"], ["/rotary/p"]),
        make("Cast", ["/rotary/p"], ["/rotary/pf"], to=TensorProto.FLOAT),
        make("Mul", ["/rotary/pf", "/rotary/frequencies"], ["/rotary/angle"]),
        make("Cos", ["/rotary/angle"], ["/rotary/c"]),
        make("Sin", ["/rotary/angle"], ["/rotary/s"]),
        make("Mul", ["/rotary/c", "/rotary/strength"], ["/rotary/cos"]),
        make("Mul", ["/rotary/s", "/rotary/strength"], ["/rotary/sin"]),
        make("Shape", ["input_ids"], ["/rotary/n1"], start=1, end=2),
        make("Shape", ["past_key_values.0.key"], ["/rotary/past1"], start=2, end=3),
        make("Squeeze", ["/rotary/n1"], ["/rotary/n"]),
        make("Squeeze", ["/rotary/past1"], ["/rotary/past"]),
        make("Add", ["/rotary/n", "/rotary/past"], ["/rotary/all"]),
        make("Range", ["/rotary/zero", "/rotary/all", "/rotary/one"], ["/rotary/keys"]),
        make("Range", ["/rotary/past", "/rotary/all", "/rotary/one"], ["/rotary/queries"]),
        make("Unsqueeze", ["/rotary/queries", "/rotary/first"], ["/rotary/column"]),
        make("LessOrEqual", ["/rotary/keys", "/rotary/column"], ["/rotary/mask"]),
    ]
    for node in reversed(nodes):
        node.name = node.output[0] + "/" + node.op_type
        graph.node.insert(0, node)


# Cleaning -------------------------------------------------------------------------------------------------------------
def prune(graph: GraphProto) -> None:
    """Removes nodes and initializers that no output needs."""
    needed = {output.name for output in graph.output} | {i.name for i in graph.input}
    for node in reversed(list(graph.node)):
        if any(output in needed for output in node.output):
            needed.update(node.input)
        else:
            graph.node.remove(node)
    for weight in [w for w in graph.initializer if w.name not in needed]:
        graph.initializer.remove(weight)
