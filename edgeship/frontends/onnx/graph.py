"""Reads the ONNX file and settles what its graph takes in: names, element types, concrete shapes."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import GraphProto, ModelProto, TensorProto, ValueInfoProto

from edgeship.errors import SourceError, UnsupportedOpError
from edgeship.frontends.onnx.dtypes import torch_dtype, type_name


@dataclass(frozen=True)
class GraphInput:
    """One input that the caller must feed: a tensor of this element type and concrete shape."""

    name: str
    elem_type: int
    shape: tuple[int, ...]


def load_model(path: Path) -> ModelProto:
    """The protobuf, without external data.

    Raises:
        SourceError: no such file, not ONNX, damaged, or an opset newer than the onnx package knows.
    """
    if not path.is_file():
        raise SourceError(f"no ONNX file at {path}", fix="give the path of a .onnx file")
    try:
        model = onnx.load_model_from_string(path.read_bytes())
    except DecodeError:
        raise SourceError(
            f"{path.name} is not an ONNX file, or it is cut short", fix="fetch it again, or export it again"
        ) from None
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}", fix="check its permissions") from error
    if not model.graph.output or not (model.ir_version or model.opset_import):
        raise SourceError(f"{path.name} holds no ONNX graph with outputs", fix="give a .onnx file of a model")
    _check_opset(model)
    return model


def opset_versions(model: ModelProto) -> dict[str, int]:
    """Domain -> opset version; the standard domain is ``""``. Files from before opsets mean version 1."""
    versions = {normal_domain(entry.domain): int(entry.version) for entry in model.opset_import}
    if model.ir_version < 3:
        versions.setdefault("", 1)
    return versions


def normal_domain(domain: str) -> str:
    """The standard domain has two spellings."""
    return "" if domain == "ai.onnx" else domain


def graph_inputs(graph: GraphProto, sizes: Mapping[str, tuple[int, ...]]) -> tuple[GraphInput, ...]:
    """The inputs in graph order with concrete shapes; inputs that have an initializer are constants.

    A symbolic dimension that one size settles is settled wherever its name occurs.

    Raises:
        SourceError: a dimension is open, or a size does not fit the declared shape.
        UnsupportedOpError: an input is a sequence, a map, an optional, or holds strings.
    """
    held = {tensor.name for tensor in graph.initializer}
    held |= {sparse.values.name for sparse in graph.sparse_initializer}
    infos = [info for info in graph.input if info.name not in held]
    _check_size_names([info.name for info in infos], sizes)
    symbols: dict[str, int] = {}
    for info in infos:
        check_tensor_type(info)
        if info.name in sizes:
            _bind_symbols(info, tuple(sizes[info.name]), symbols)
    return tuple(_graph_input(info, sizes, symbols) for info in infos)


def check_tensor_type(info: ValueInfoProto) -> None:
    """Raise UnsupportedOpError where ``info`` is not a dense tensor of numbers."""
    kind = info.type.WhichOneof("value")
    if kind != "tensor_type":
        what = (kind or "value of unknown type").removesuffix("_type").replace("_", " ")
        raise UnsupportedOpError(
            f'"{info.name}" is {"an" if what == "optional" else "a"} {what}; only tensors cross the graph\'s border',
            fix="export a model whose inputs and outputs are tensors",
        )
    torch_dtype(info.type.tensor_type.elem_type, f'"{info.name}"')


def _graph_input(info: ValueInfoProto, sizes: Mapping[str, tuple[int, ...]], symbols: Mapping[str, int]) -> GraphInput:
    tensor_type = info.type.tensor_type
    if info.name in sizes:
        return GraphInput(info.name, tensor_type.elem_type, tuple(sizes[info.name]))
    fix = f"give its size: --input {info.name}:{_example(info)}"
    if not tensor_type.HasField("shape"):
        raise SourceError(f'input "{info.name}" has no shape', fix=fix)
    shape = []
    for axis, dim in enumerate(tensor_type.shape.dim):
        size = symbols.get(dim.dim_param, -1) if dim.dim_param else dim.dim_value
        if size < 0 or dim.WhichOneof("value") is None:
            name = f' "{dim.dim_param}"' if dim.dim_param else ""
            raise SourceError(f'input "{info.name}": dimension {axis}{name} has no fixed size', fix=fix)
        shape.append(int(size))
    return GraphInput(info.name, tensor_type.elem_type, tuple(shape))


def _bind_symbols(info: ValueInfoProto, size: tuple[int, ...], symbols: dict[str, int]) -> None:
    if any(value < 0 for value in size):
        raise SourceError(f'input "{info.name}" cannot have the size {list(size)}', fix="sizes are 0 or more")
    if not info.type.tensor_type.HasField("shape"):
        return
    dims = info.type.tensor_type.shape.dim
    if len(dims) != len(size):
        raise SourceError(
            f'input "{info.name}" has {len(dims)} dimensions, the size given has {len(size)}',
            fix=f"for example --input {info.name}:{_example(info)}",
        )
    for axis, (dim, value) in enumerate(zip(dims, size, strict=True)):
        fixed = symbols.setdefault(dim.dim_param, value) if dim.dim_param else dim.dim_value
        # Old exporters write 0 or -1 where they mean "any".
        if dim.WhichOneof("value") is not None and fixed > 0 and fixed != value:
            name = f' ("{dim.dim_param}")' if dim.dim_param else ""
            raise SourceError(
                f'input "{info.name}": dimension {axis}{name} is {fixed}, not {value}',
                fix="leave the size out, or give the size that the graph was made for",
            )


def _check_size_names(names: list[str], sizes: Mapping[str, tuple[int, ...]]) -> None:
    for name in sizes:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            listed = ", ".join(f'"{known}"' for known in names) or "none"
            fix = f'did you mean "{close[0]}"?' if close else f"its inputs: {listed}"
            raise SourceError(f'the graph has no input "{name}"', fix=fix)


def _check_opset(model: ModelProto) -> None:
    version = opset_versions(model).get("", 1)
    newest = onnx.defs.onnx_opset_version()
    if version > newest:
        raise SourceError(
            f"opset {version} is newer than opset {newest}, the last one that onnx {onnx.__version__} knows",
            fix="export with a lower opset, or install a newer onnx package",
        )
    if version < 1:
        raise SourceError(f"opset {version} does not exist", fix="export the model again")


def _example(info: ValueInfoProto) -> str:
    """A size to show in an error: ``f32[1,3,224,224]`` with the open dimensions filled in."""
    short = {TensorProto.FLOAT: "f32", TensorProto.FLOAT16: "f16", TensorProto.INT64: "i64", TensorProto.INT32: "i32"}
    tensor_type = info.type.tensor_type
    name = short.get(tensor_type.elem_type, type_name(tensor_type.elem_type))
    if not tensor_type.HasField("shape"):
        return f"{name}[1,3,224,224]"
    dims = tensor_type.shape.dim
    guesses = [1, 3, 224, 224] if len(dims) == 4 else [1] + [128] * len(dims)
    shown = (dim.dim_value if dim.dim_value > 0 else guess for dim, guess in zip(dims, guesses, strict=False))
    return f"{name}[{','.join(str(size) for size in shown)}]"
