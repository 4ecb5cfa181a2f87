"""Int8 in a graph whose weights are inputs: codes and scales as inputs, QuantizeLinear pairs around activations.

Weights are signed codes with one scale per row (output channel), as ``baffle.core.quantize`` makes them. Activations
are unsigned codes with one scale and zero point per tensor. These are inputs too: the client measures them on its own
data with the second graph made here, which gives the smallest and the largest value of every such tensor.

The arrangement of nodes is the one that ONNX Runtime turns into int8 kernels (QLinearConv, MatMulIntegerToFloat)
although no scale is constant: convolutions without their bias between quantised tensors, linear layers as a matrix
product with a float result; biases are added in float. It is the QDQ format,
onnxruntime.ai/docs/performance/model-optimizations.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from baffle.core.quantize import LARGEST_CODE

_OPERATORS = ("Conv", "Gemm", "MatMul")


@dataclass(frozen=True)
class Quantized:
    """Results of ``quantize``."""

    model: onnx.ModelProto
    """The int8 graph."""
    ranges: onnx.ModelProto
    """The graph that measures the ranges of activations."""
    quantized: frozenset[str]
    """Weights, trained or constant, that became int8 codes."""
    activations: tuple[str, ...]
    """Quantised activations."""


def quantize(
    model: onnx.ModelProto, trained: tuple[str, ...], *, trained_in_float: bool, weights_only: bool
) -> Quantized:
    """Quantise convolutions and linear layers.

    Args:
        model: A graph of ``trace``.
        trained: Names of the trained weights, which are inputs; other weights are constants.
        trained_in_float: Whether layers with a trained weight stay in float.
        weights_only: Whether activations stay in float.

    Returns:
        The quantised graph, and a graph that measures the ranges of its activations.
    """
    chosen = () if trained_in_float else trained
    int8 = _Rewriter(model, trained, chosen, activations="none" if weights_only else "quantise")
    ranges = _Rewriter(model, trained, chosen, activations="measure")
    activations = () if weights_only else tuple(int8.measured)
    return Quantized(int8.result, ranges.result, frozenset(int8.coded), activations)


@dataclass
class _Rewriter:
    """Rewrites a graph in one traversal of its nodes."""

    source: onnx.ModelProto
    trained: tuple[str, ...]
    chosen: tuple[str, ...]
    activations: str
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    done: dict[str, str] = field(default_factory=dict)
    coded: list[str] = field(default_factory=list)
    measured: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        graph = self.source.graph
        self.values = {c.name: c for c in graph.initializer}
        self.shapes = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in graph.input}
        # a linear layer reads its weight through a transposition
        self.transposed = {
            n.output[0]: n.input[0]
            for n in graph.node
            if n.op_type == "Transpose" and n.input[0] in self.trained and len(self.shapes[n.input[0]]) == 2
        }
        self.chosen = tuple(set(self.chosen) - self._read_as_numbers())
        for node in graph.node:
            self._visit(node)
        self.result = self._assemble()

    def _read_as_numbers(self) -> set[str]:
        """Tensors that are read otherwise than as the weight of a convolution or linear layer, and must stay floats."""
        graph = self.source.graph
        read = {o.name for o in graph.output}
        for node in graph.node:
            if not (node.op_type == "Transpose" and node.output[0] in self.transposed):
                weight = self._weight_of(node)
                read |= {name for i, name in enumerate(node.input) if i != 1 or weight is None}
        return read | {source for turned, source in self.transposed.items() if turned in read}

    def _weight_of(self, node: onnx.NodeProto) -> str | None:
        """The weight of a convolution or linear layer that can be quantised; None for any other node."""
        if node.op_type not in _OPERATORS:
            return None
        attributes = _attributes(node)
        source = self.transposed.get(node.input[1], node.input[1])
        constant = source in self.values
        rank = len(self.values[source].dims if constant else self.shapes.get(source, []))
        if node.op_type == "Conv":
            return None if constant and attributes.get("group", 1) != 1 else source
        plain = attributes.get("alpha", 1.0) == attributes.get("beta", 1.0) == 1.0 and not attributes.get("transA")
        # a trained weight has one scale per row, so its rows must be the outputs
        rows = constant or source != node.input[1] or bool(attributes.get("transB"))
        return source if plain and rows and rank == 2 else None

    def _visit(self, node: onnx.NodeProto) -> None:
        source = self._weight_of(node)
        if source is None or not (source in self.chosen or source in self.values):
            self.nodes.append(node)
            return
        attributes = _attributes(node)
        bias = node.input[2] if len(node.input) > 2 else None
        if node.op_type == "Conv":
            self._convolution(node, source, bias, attributes)
        else:
            transposed = source != node.input[1] or bool(attributes.get("transB"))
            self._linear(node, source, bias, transposed)

    def _convolution(self, node: onnx.NodeProto, source: str, bias: str | None, attributes: dict[str, Any]) -> None:
        out = node.output[0]
        weight = self._weight(source, axis=0, transpose=False)
        if self.activations == "none":
            operands = [node.input[0], weight, *([bias] if bias else [])]
            self._add("Conv", operands, out, **attributes)
            return
        self._add("Conv", [self._activation(node.input[0]), weight], f"{out}.plain", **attributes)
        result = self._activation(f"{out}.plain")
        if bias is None:
            self._add("Identity", [result], out)
            return
        spatial = len(self.shapes.get(source) or self.values[source].dims) - 2
        column = self._constant(f"{out}.column", np.array([1, -1] + [1] * spatial, np.int64))
        self._add("Reshape", [bias, column], f"{out}.bias")
        self._add("Add", [result, f"{out}.bias"], out)

    def _linear(self, node: onnx.NodeProto, source: str, bias: str | None, transposed: bool) -> None:
        out = node.output[0]
        # rows of a weight [out, in] are its channels, and so are columns of a constant [in, out]
        weight = self._weight(source, axis=0 if transposed else 1, transpose=transposed)
        product = out if bias is None else f"{out}.plain"
        self._add("MatMul", [self._activation(node.input[0]), weight], product)
        if bias is not None:
            self._add("Add", [product, bias], out)

    def _weight(self, source: str, axis: int, transpose: bool) -> str:
        """The weight in float, from codes; transposed as codes, since dequantisation must be the last step."""
        name = f"{source}.{'transposed' if transpose else 'whole'}"
        if name in self.done:
            return self.done[name]
        if f"{source}.codes" not in self.done:
            self._codes(source, axis)
            self.done[f"{source}.codes"] = f"{source}.codes"
        codes = f"{source}.codes"
        if transpose:
            self._add("Transpose", [codes], f"{source}.turned", perm=[1, 0])
            codes, axis = f"{source}.turned", 1 - axis
        self._add("DequantizeLinear", [codes, f"{source}.scale"], name, axis=axis)
        self.done[name] = name
        return name

    def _codes(self, source: str, axis: int) -> None:
        if source in self.values:
            codes, scales = _encode_constant(numpy_helper.to_array(self.values[source]), axis)
            self._constant(f"{source}.codes", codes)
            self._constant(f"{source}.scale", scales)
            self.coded.append(source)
            return
        shape = self.shapes[source]
        self.inputs.append(helper.make_tensor_value_info(f"{source}.codes", TensorProto.INT8, shape))
        self.inputs.append(helper.make_tensor_value_info(f"{source}.scale", TensorProto.FLOAT, shape[:1]))
        self.coded.append(source)

    def _activation(self, name: str) -> str:
        """An activation, quantised and dequantised (or measured)."""
        if self.activations == "none":
            return name
        if name not in self.measured:
            self.measured.append(name)
            if self.activations == "quantise":
                self.inputs.append(helper.make_tensor_value_info(f"{name}.scale", TensorProto.FLOAT, []))
                self.inputs.append(helper.make_tensor_value_info(f"{name}.zero", TensorProto.UINT8, []))
                parameters = [f"{name}.scale", f"{name}.zero"]
                self._add("QuantizeLinear", [name, *parameters], f"{name}.quantised")
                self._add("DequantizeLinear", [f"{name}.quantised", *parameters], f"{name}.back")
            else:
                self._add("ReduceMin", [name], f"{name}.min", keepdims=0)
                self._add("ReduceMax", [name], f"{name}.max", keepdims=0)
        return f"{name}.back" if self.activations == "quantise" else name

    def _add(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> None:
        self.nodes.append(helper.make_node(operator, inputs, [output], **attributes))

    def _constant(self, name: str, value: npt.NDArray[np.generic]) -> str:
        self.constants.append(numpy_helper.from_array(value, name))
        return name

    def _assemble(self) -> onnx.ModelProto:
        graph = self.source.graph
        read = {name for node in self.nodes for name in node.input} | {o.name for o in graph.output}
        nodes = [n for n in self.nodes if any(o in read for o in n.output) or n.op_type.startswith("Reduce")]
        read = {name for node in nodes for name in node.input} | {o.name for o in graph.output}
        outputs = list(graph.output)
        if self.activations == "measure":
            for name in self.measured:
                outputs += [
                    helper.make_tensor_value_info(f"{name}.{end}", TensorProto.FLOAT, []) for end in ("min", "max")
                ]
        made = helper.make_graph(
            nodes,
            graph.name,
            [i for i in graph.input if i.name in read or i.name in ("x", "y")] + self.inputs,
            outputs,
            [c for c in (*graph.initializer, *self.constants) if c.name in read],
        )
        model = helper.make_model(made, opset_imports=self.source.opset_import, ir_version=self.source.ir_version)
        onnx.checker.check_model(model)
        return model


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def _encode_constant(
    weight: npt.NDArray[np.generic], axis: int
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Codes and scales of a frozen weight; each channel uses the full range of codes."""
    values = np.moveaxis(weight.astype(np.float32), axis, 0)
    scales = np.maximum(np.abs(values.reshape(len(values), -1)).max(axis=1), np.float32(2.0**-20)) / LARGEST_CODE
    codes = np.rint(values / scales.reshape(-1, *[1] * (values.ndim - 1))).astype(np.int8)
    return np.ascontiguousarray(np.moveaxis(codes, 0, axis)), scales.astype(np.float32)
