"""Surgery on exported ONNX graphs: LoRA as optional inputs, and a readout instead of logits. onnx only, no torch.

Adapter arrays enter under their PEFT names and in PEFT's orientation, A (rank, in) and B (out, rank) with alpha / rank
already multiplied into B. Their default is rank 0, which adds nothing, so a graph without feeds is the base model.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from edge_sdk.adapters import Slot
from edge_sdk.errors import DataError


def module_of(node: NodeProto) -> str | None:
    """`/encoder/layer.0/attention/self/query/MatMul` -> `encoder.layer.0.attention.self.query`; None for other nodes."""
    if node.op_type != "MatMul" or not node.name.endswith("/MatMul"):
        return None
    name: str = node.name
    return name.removesuffix("/MatMul").strip("/").replace("/", ".")


def add_lora(graph: GraphProto, modules: Iterable[str]) -> tuple[Slot, ...]:
    """Adds x A^T B^T to the output of every linear layer whose module path ends in one of `modules`.

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
        _insert(graph, node, slot)
        slots.append(slot)
    for name in wanted:
        if not any(slot.module.endswith(f".{name}") for slot in slots):
            raise DataError(f"the exported graph has no linear layer named {name!r}")
    return tuple(slots)


def _insert(graph: GraphProto, node: NodeProto, slot: Slot) -> None:
    stem = f"/lora/{slot.module}"
    result = node.output[0]
    node.output[0] = f"{stem}/base"
    added = [
        helper.make_node("Transpose", [slot.a], [f"{stem}/At"], name=f"{stem}/TransposeA", perm=[1, 0]),
        helper.make_node("Transpose", [slot.b], [f"{stem}/Bt"], name=f"{stem}/TransposeB", perm=[1, 0]),
        helper.make_node("MatMul", [node.input[0], f"{stem}/At"], [f"{stem}/xA"], name=f"{stem}/MatMulA"),
        helper.make_node("MatMul", [f"{stem}/xA", f"{stem}/Bt"], [f"{stem}/delta"], name=f"{stem}/MatMulB"),
        helper.make_node("Add", [f"{stem}/base", f"{stem}/delta"], [result], name=f"{stem}/Add"),
    ]
    at = list(graph.node).index(node) + 1
    for offset, new in enumerate(added):
        graph.node.insert(at + offset, new)
    for name, empty, shape in (
        (slot.a, (0, slot.in_features), ["rank", slot.in_features]),
        (slot.b, (slot.out_features, 0), [slot.out_features, "rank"]),
    ):
        graph.initializer.append(numpy_helper.from_array(np.zeros(empty, np.float32), name))
        graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))


def decoder_readout(graph: GraphProto) -> None:
    """Ends a causal LM at the final hidden state of each sequence's last real token: `readout` (batch, width).

    A second output, `rows` (n_labels, width), gathers the output embeddings of the input `label_ids` (n_labels,), so that
    no scores for the other 49,000 words are ever computed.

    Raises:
        DataError: the output head is not a MatMul on a constant weight.
    """
    weights = {w.name: w for w in graph.initializer}
    made_by = {output: node for node in graph.node for output in node.output}
    head = made_by[graph.output[0].name]
    source = made_by.get(head.input[1]) if head.op_type == "MatMul" else None
    if source is not None and source.op_type == "Transpose" and source.input[0] in weights:
        vocabulary, axis = source.input[0], 0
    elif head.op_type == "MatMul" and head.input[1] in weights:
        vocabulary, axis = head.input[1], 1
    else:
        raise DataError("the exported causal LM does not end in a MatMul with a constant weight")
    width = weights[vocabulary].dims[1 - axis]
    graph.node.remove(head)
    if source is not None and source in graph.node:
        graph.node.remove(source)
    nodes = [
        helper.make_node("ReduceSum", ["attention_mask", "/readout/axis"], ["/readout/length"], keepdims=1),
        helper.make_node("Sub", ["/readout/length", "/readout/one"], ["/readout/last"]),
        helper.make_node("GatherND", [head.input[0], "/readout/last"], ["readout"], batch_dims=1),
    ]
    graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), "/readout/axis"))
    graph.initializer.append(numpy_helper.from_array(np.array(1, np.int64), "/readout/one"))
    gathered = "rows" if axis == 0 else "/rows/columns"
    nodes.append(helper.make_node("Gather", [vocabulary, "label_ids"], [gathered], axis=axis))
    if axis == 1:
        nodes.append(helper.make_node("Transpose", [gathered], ["rows"], perm=[1, 0]))
    graph.node.extend(nodes)
    graph.input.append(helper.make_tensor_value_info("label_ids", TensorProto.INT64, ["labels"]))
    _outputs(graph, readout=["batch", width], rows=["labels", width])


def encoder_readout(graph: GraphProto, width: int) -> None:
    """Ends an encoder at the unit-length mean over real tokens: `readout` (batch, width)."""
    hidden = graph.output[0].name
    for name, value in (("/readout/axis", [1]), ("/readout/last", [2])):
        graph.initializer.append(numpy_helper.from_array(np.array(value, np.int64), name))
    graph.initializer.append(numpy_helper.from_array(np.array(1e-12, np.float32), "/readout/tiny"))
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


def _outputs(graph: GraphProto, **outputs: list[str | int]) -> None:
    del graph.output[:]
    for name, shape in outputs.items():
        graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))


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
