"""A float graph -> an int8 graph: weights as integers, activations rounded token by token while it runs. onnx only.

One scale for a whole activation tensor, ONNX Runtime's own dynamic quantization, lets one outlier token (the first of a
sequence, or padding) spoil all others, and makes a text's score depend on its neighbours. So each token is divided by its
own largest value first, which is exact, and multiplied back after the product. Layers that hurt most are given the
rounding's remainder in a second product: 16-bit activations on the same 8-bit weights, at no cost in size.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from edge_export.graph import constant, module_of

LEVELS = 127
HEAD_LEVELS = 63  # beside a table of full int8 values, activations take 7 bits, so that two products still fit into 16
CONTRIB = "com.microsoft"


@dataclass(frozen=True)
class IntMatrix:
    """Integers (in, out) within int8 and a scale for each output (out,)."""

    integers: NDArray[np.int8]
    scale: NDArray[np.float32]


def quantize(graph: GraphProto, matrices: Mapping[str, IntMatrix], fine: Collection[str], tables: Collection[str]) -> None:
    """Replaces the MatMuls of the named modules and the named embedding tables, in place.

    Args:
        matrices: by module path.
        fine: modules whose activations keep 16 bits.
        tables: initializers (rows, width) that Gather reads, rounded row by row.
    """
    weights = {w.name: w for w in graph.initializer}
    _constants(graph)
    inputs: dict[str, _Tokens] = {}
    nodes: list[NodeProto] = []
    for node in graph.node:
        module = module_of(node)
        if module is not None and module in matrices:
            tokens = inputs.get(node.input[0])
            if tokens is None:
                tokens = inputs[node.input[0]] = _Tokens(node.input[0], node.name)
            nodes += _product(graph, node, tokens, matrices[module], module in fine)
        elif node.op_type == "Gather" and node.input[0] in tables:
            nodes += _lookup(graph, node, weights[node.input[0]])
        elif node.op_type == "Transpose" and node.input[0] in tables:
            continue  # the head's own product takes its place
        elif node.name == "/head/Project":
            nodes += _head(graph, node, weights, tables)
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


class _Tokens:
    """One activation tensor, rounded when the first product asks for it: unit rows, and what each row was divided by."""

    def __init__(self, source: str, stem: str, constants: str = "/int8") -> None:
        self.source = source
        self.stem = f"/int8{stem}"
        self.step, self.fine_step, self.zero = (f"{constants}/{name}" for name in ("step", "finestep", "zero"))
        self._coarse: list[NodeProto] | None = None
        self._fine: list[NodeProto] | None = None

    @property
    def scale(self) -> str:
        return f"{self.stem}/scale"

    def coarse(self) -> tuple[str, list[NodeProto]]:
        """Name of the uint8 tensor, and the nodes that make it (none the second time)."""
        s, new = self.stem, self._coarse is None
        self._coarse = [
            helper.make_node("ReduceMax", [self.source, "/int8/axis"], [f"{s}/max"], keepdims=1, name=f"{s}/ReduceMax"),
            helper.make_node("ReduceMin", [self.source, "/int8/axis"], [f"{s}/min"], keepdims=1, name=f"{s}/ReduceMin"),
            helper.make_node("Neg", [f"{s}/min"], [f"{s}/low"], name=f"{s}/Neg"),
            helper.make_node("Max", [f"{s}/max", f"{s}/low", "/int8/tiny"], [self.scale], name=f"{s}/Max"),
            helper.make_node("Div", [self.source, self.scale], [f"{s}/unit"], name=f"{s}/Div"),
            helper.make_node("QuantizeLinear", [f"{s}/unit", self.step, self.zero], [f"{s}/q"], name=f"{s}/Quantize"),
        ]
        return f"{s}/q", self._coarse if new else []

    def fine(self) -> tuple[str, list[NodeProto]]:
        """The same for what the first rounding left over, in steps 254 times smaller."""
        s, new = self.stem, self._fine is None
        self._fine = [
            helper.make_node("DequantizeLinear", [f"{s}/q", self.step, self.zero], [f"{s}/back"], name=f"{s}/Back"),
            helper.make_node("Sub", [f"{s}/unit", f"{s}/back"], [f"{s}/rest"], name=f"{s}/Sub"),
            helper.make_node("QuantizeLinear", [f"{s}/rest", self.fine_step, self.zero], [f"{s}/r"], name=f"{s}/Fine"),
        ]
        return f"{s}/r", self._fine if new else []


def _constants(graph: GraphProto) -> None:
    constant(graph, "/int8/axis", np.array([-1], np.int64))
    constant(graph, "/int8/tiny", np.array(1e-6, np.float32))
    constant(graph, "/int8/zero_weight", np.array(0, np.int8))
    for name, levels in (("/int8", LEVELS), ("/int8head", HEAD_LEVELS)):
        constant(graph, f"{name}/step", np.array(1 / levels, np.float32))
        constant(graph, f"{name}/finestep", np.array(0.5 / levels**2, np.float32))
        constant(graph, f"{name}/zero", np.array(levels + 1, np.uint8))


def _product(graph: GraphProto, node: NodeProto, tokens: _Tokens, matrix: IntMatrix, fine: bool) -> list[NodeProto]:
    weight = constant(graph, f"{node.name}/int8", matrix.integers)
    scale = constant(graph, f"{node.name}/scale", matrix.scale.astype(np.float32))
    q, nodes = tokens.coarse()
    nodes = [*nodes, _to_float(node.name, (q, tokens.step, tokens.zero), weight, scale, f"{node.name}/unit")]
    result = f"{node.name}/unit"
    if fine:
        r, more = tokens.fine()
        nodes += [*more, _to_float(f"{node.name}/Rest", (r, tokens.fine_step, tokens.zero), weight, scale, f"{node.name}/rest")]
        nodes.append(helper.make_node("Add", [result, f"{node.name}/rest"], [f"{node.name}/sum"], name=f"{node.name}/Sum"))
        result = f"{node.name}/sum"
    return [*nodes, helper.make_node("Mul", [result, tokens.scale], [node.output[0]], name=f"{node.name}/Scale")]


def _to_float(name: str, rounded: tuple[str, str, str], weight: str, scale: str, output: str) -> NodeProto:
    """The product of rounded activations (tensor, step, zero point) and integer weights, as floats."""
    q, step, zero = rounded
    inputs = [q, weight, step, scale, zero, "/int8/zero_weight"]
    return helper.make_node("MatMulIntegerToFloat", inputs, [output], domain=CONTRIB, name=f"{name}/Int8")


def rounded_rows(table: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """A table (rows, width) as int8 with one scale for each row, (rows, 1)."""
    scale = np.maximum(np.abs(table).max(axis=1, keepdims=True) / LEVELS, 1e-12).astype(np.float32)
    return np.rint(table / scale).astype(np.int8), scale


def _table(graph: GraphProto, weight: TensorProto) -> tuple[str, str]:
    """Adds the integers and scales of a table once; returns their names."""
    names = f"{weight.name}/int8", f"{weight.name}/scale"
    if not any(w.name == names[0] for w in graph.initializer):
        integers, scale = rounded_rows(numpy_helper.to_array(weight))
        constant(graph, names[0], integers)
        constant(graph, names[1], scale)
    return names


def _lookup(graph: GraphProto, node: NodeProto, weight: TensorProto) -> list[NodeProto]:
    integers, scale = _table(graph, weight)
    stem = node.name
    return [
        helper.make_node("Gather", [integers, node.input[1]], [f"{stem}/q"], axis=0, name=f"{stem}/Integers"),
        helper.make_node("Gather", [scale, node.input[1]], [f"{stem}/s"], axis=0, name=f"{stem}/Scales"),
        helper.make_node("Cast", [f"{stem}/q"], [f"{stem}/f"], to=TensorProto.FLOAT, name=f"{stem}/Cast"),
        helper.make_node("Mul", [f"{stem}/f", f"{stem}/s"], [node.output[0]], name=f"{stem}/Mul"),
    ]


def _head(graph: GraphProto, node: NodeProto, weights: Mapping[str, TensorProto], tables: Collection[str]) -> list[NodeProto]:
    """Scores of every next token from the rounded table, with 14-bit activations in two halves of 7."""
    table = next(name for name in tables if name in weights and _feeds_head(graph, name))
    integers, _ = _table(graph, weights[table])
    scale = numpy_helper.to_array(next(w for w in graph.initializer if w.name == f"{table}/scale"))[:, 0]
    columns = constant(graph, "/head/scale", scale)
    tokens = _Tokens(node.input[0], "/head", "/int8head")
    q, nodes = tokens.coarse()
    r, more = tokens.fine()
    return [
        *nodes,
        *more,
        helper.make_node("Transpose", [integers], ["/head/columns"], perm=[1, 0], name="/head/Transpose"),
        _to_float("/head/Coarse", (q, tokens.step, tokens.zero), "/head/columns", columns, "/head/unit"),
        _to_float("/head/Rest", (r, tokens.fine_step, tokens.zero), "/head/columns", columns, "/head/rest"),
        helper.make_node("Add", ["/head/unit", "/head/rest"], ["/head/sum"], name="/head/Sum"),
        helper.make_node("Mul", ["/head/sum", tokens.scale], [node.output[0]], name="/head/Mul"),
    ]


def _feeds_head(graph: GraphProto, table: str) -> bool:
    return any(n.name == "/head/Transpose" and n.input[0] == table for n in graph.node)
