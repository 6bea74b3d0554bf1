"""ONNX files of a flow map's graphs: written with the weights in the type that was asked for, and compared."""

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowmaps.deployment.graphs import Agreement, Graph, facts, trace
from flowmaps.errors import UserError
from flowmaps.flow_map import FlowMap

STORAGE = ("float32", "float16", "int8")  # of weights; every graph computes in float32
SMALL = 1024  # numbers: tensors with fewer stay float32
LARGEST_FILE = 1_900_000_000  # bytes of weights inside one file: protobuf ends at 2 GiB
WEIGHT = {"Conv": 0, "Gemm": 0, "MatMul": -1}  # operator -> output channel among the dimensions of its weight


def check_installed() -> None:
    """Refuse to go on without the packages of the extra ``onnx``."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise UserError(f"needs {', '.join(missing)}: pip install {' '.join(missing)}", field="onnx")


def write_onnx(graph: Graph, fm: FlowMap, path: Path, storage: str = "float32") -> Agreement:
    """Write ``graph`` as an ONNX file, open it in onnxruntime and compare it with the module.

    Args:
        graph: One of ``graphs(fm)``.
        fm: The flow map, whose facts go into the file's ``metadata_props``.
        path: The file to write; weights beyond LARGEST_FILE go to a second one, ``path`` with .data.
        storage: Type of the weights in the file, one of STORAGE: int8 with a scale for each output channel. Of types
            other than float32 the difference is only measured, not limited.

    Raises:
        UserError: A package is missing, or the file differs from the network.
    """
    check_installed()
    import onnx_ir
    from onnxscript import optimizer

    given = graph.inputs(1)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            trace(graph), input_names=list(given), output_names=[graph.output], dynamo=True, verbose=False
        )
        assert program is not None
        model: Any = program.model
        # Whatever depends on weights alone is computed now, such as EDM2's normalised weights.
        optimizer.optimize(model, input_size_limit=1 << 40, output_size_limit=1 << 40)
    _store(model, storage)
    _strip(model)
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.shape = onnx_ir.Shape(["batch", *value.shape[1:]])
    model.metadata_props.update({**facts(fm), "graph": graph.name, "storage": storage})
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    onnx_ir.save(model, path, external_data=f"{path.name}.data" if size > LARGEST_FILE else None)
    agreement = graph.compare(runner(path, graph.output))
    if storage == "float32":
        agreement.check(path.name)
    return agreement


def runner(path: Path, output: str, threads: int = 0) -> Any:
    """Return a function from named tensors to the tensor ``output`` that runs the file in onnxruntime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(given: dict[str, Tensor]) -> Tensor:
        return torch.from_numpy(session.run([output], {name: value.numpy() for name, value in given.items()})[0])

    return run


def _strip(model: Any) -> None:
    """Remove what the exporter noted about the machine on which it ran: stack traces, paths, names of modules."""
    graph = model.graph
    values = [*graph.inputs, *graph.outputs, *graph.initializers.values()]
    for node in graph.all_nodes():
        values += node.outputs
        node.metadata_props.clear()
        node.doc_string = None
    for value in values:
        value.metadata_props.clear()
        value.doc_string = None
        if value.const_value is None and not (value.is_graph_input() or value.is_graph_output()):
            value.shape, value.type = None, None  # else written as value_info
    model.metadata_props.clear()
    graph.metadata_props.clear()
    model.doc_string = graph.doc_string = None


def _store(model: Any, storage: str) -> None:
    """Replace weights in float32 by ones of the type ``storage`` and a node that makes float32 of them."""
    import onnx_ir

    if storage == "float32":
        return
    graph = model.graph
    for name, value in list(graph.initializers.items()):
        numbers = value.const_value.numpy()
        if numbers.dtype != np.float32 or numbers.size < SMALL:
            continue
        if storage == "float16":
            half = numbers.astype(np.float16)
            if not np.isfinite(half).all():
                continue  # beyond 65,504
            stored, attributes = [(f"{name}_float16", half)], [onnx_ir.AttrInt64("to", onnx_ir.DataType.FLOAT.value)]
            operator = "Cast"
        else:
            axis = _channels(value, numbers.ndim)
            if axis is None:
                continue
            integers, scale = quantised(numbers, axis)
            stored, attributes = (
                [(f"{name}_int8", integers), (f"{name}_scale", scale)],
                [onnx_ir.AttrInt64("axis", axis)],
            )
            operator = "DequantizeLinear"
        inputs = []
        for key, array in stored:
            tensor = onnx_ir.tensor(array, name=key)
            kind = onnx_ir.TensorType(tensor.dtype)
            inputs.append(onnx_ir.Value(name=key, shape=onnx_ir.Shape(array.shape), type=kind, const_value=tensor))
        node = onnx_ir.Node("", operator, inputs, attributes)
        graph.insert_before(graph[0], node)
        del graph.initializers[name]
        value.replace_all_uses_with(node.outputs[0])
        node.outputs[0].name = name
        for given in inputs:
            graph.register_initializer(given)


def _channels(value: Any, ndim: int) -> int | None:
    """Return the dimension of a weight's output channels; None for a tensor that is not the weight of one layer."""
    uses = list(value.uses())
    if len(uses) != 1 or uses[0].idx != 1 or uses[0].node.op_type not in WEIGHT:
        return None
    node, axis = uses[0].node, WEIGHT[uses[0].node.op_type]
    if node.op_type == "Gemm":
        transposed = node.attributes.get("transB")
        axis = 0 if transposed is not None and transposed.as_int() else 1
    return axis % ndim


def quantised(numbers: "np.ndarray[Any, Any]", axis: int) -> "tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]":
    """Return ``numbers`` as int8 in -127 .. 127 and the float32 scale of each entry along ``axis``."""
    others = tuple(i for i in range(numbers.ndim) if i != axis)
    scale = np.abs(numbers).max(axis=others, keepdims=True) / 127
    scale[scale == 0] = 1
    return np.round(numbers / scale).astype(np.int8), scale.reshape(-1).astype(np.float32)
