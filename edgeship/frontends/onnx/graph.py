"""Reads the ONNX file and settles what its graph takes in: names, element types, concrete shapes."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import GraphProto, ModelProto, TensorShapeProto, ValueInfoProto

from edgeship.core.model import NUMPY_DTYPES
from edgeship.core.names import clean_names
from edgeship.data.specs import in_command
from edgeship.errors import SourceError, UnsupportedOpError
from edgeship.frontends.onnx.dtypes import numpy_name, torch_dtype, type_name

_SHORT = {name: short for short, name in NUMPY_DTYPES.items()}


@dataclass(frozen=True)
class GraphInput:
    """One input: a tensor of this element type and concrete shape; ``value`` where the user fixed it."""

    name: str
    elem_type: int
    shape: tuple[int, ...]
    value: torch.Tensor | None = None

    @property
    def is_fixed(self) -> bool:
        """Whether it is a constant."""
        return self.value is not None

    @property
    def dtype(self) -> torch.dtype:
        """What the graph takes: double precision becomes float32, as half precision does."""
        dtype = torch_dtype(self.elem_type, f'input "{self.name}"')
        return torch.float32 if dtype == torch.float64 else dtype


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


def graph_inputs(
    graph: GraphProto, sizes: Mapping[str, tuple[int, ...]], values: Mapping[str, Any]
) -> tuple[GraphInput, ...]:
    """The inputs in graph order with concrete shapes; inputs that have an initializer are constants.

    A symbolic dimension that one size settles is settled wherever its name occurs; ``?`` is not a name.

    Args:
        sizes, values: shapes, and numbers for inputs that become constants, by name or its clean spelling.

    Raises:
        SourceError: a dimension is open, or a size or value does not fit what the file declares.
        UnsupportedOpError: an input is a sequence, a map, an optional, or holds strings.
    """
    # Old files list their weights among the inputs too.
    held = {tensor.name for tensor in graph.initializer}
    held |= {sparse.values.name for sparse in graph.sparse_initializer}
    infos = [info for info in graph.input if info.name not in held]
    names = [info.name for info in infos]
    sizes = {_meant(name, names): size for name, size in sizes.items()}
    values = {_meant(name, names): value for name, value in values.items()}
    symbols: dict[str, int] = {}
    for info in infos:
        check_tensor_type(info)
        if info.name in sizes:
            _bind_symbols(info, tuple(sizes[info.name]), symbols)
    fixed = {info.name: _fixed_input(info, values[info.name], symbols) for info in infos if info.name in values}
    open_infos: list[ValueInfoProto] = []
    for info in infos:
        if info.name not in fixed and info.name not in sizes and _open_axis(info, symbols):
            open_infos.append(info)
    if open_infos:
        raise SourceError(_open_axis(open_infos[0], symbols), fix=_all_sizes(open_infos, symbols))
    inputs: list[GraphInput] = []
    for info in infos:
        if info.name in fixed:
            inputs.append(fixed[info.name])
        else:
            shape = sizes.get(info.name, _shape(info, symbols))
            inputs.append(GraphInput(info.name, info.type.tensor_type.elem_type, shape))
    return tuple(inputs)


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


def _fixed_input(info: ValueInfoProto, value: Any, symbols: dict[str, int]) -> GraphInput:
    """An input that the user gave a value: one number for all of a known shape, or nested lists of the shape."""
    tensor_type = info.type.tensor_type
    dtype = torch_dtype(tensor_type.elem_type, f'input "{info.name}"')
    shown = in_command(info.name, "=...")
    try:
        tensor = torch.tensor(value, dtype=torch.float64 if dtype.is_floating_point else None)
    except (ValueError, TypeError, RuntimeError, OverflowError):
        raise SourceError(
            f'input "{info.name}": its value is not a tensor', fix=f"{shown} wants rows of one length"
        ) from None
    if not torch.equal(tensor.to(dtype).to(tensor.dtype), tensor) and not dtype.is_floating_point:
        name = type_name(tensor_type.elem_type)
        raise SourceError(f'input "{info.name}" holds {name}, its value is none', fix=f"{shown} wants {name}")
    if not bool(torch.isfinite(tensor).all()):
        raise SourceError(f'input "{info.name}": its value is not finite', fix=f"{shown} wants finite numbers")
    if tensor_type.HasField("shape") and tensor.dim() == 0:
        # One number stands for every element; what is still open has one.
        tensor = tensor.expand([max(size, 1) for size in _shape(info, symbols)])
    _bind_symbols(info, tuple(tensor.shape), symbols)
    return GraphInput(info.name, tensor_type.elem_type, tuple(tensor.shape), tensor.to(dtype).contiguous())


def _symbol(dim: TensorShapeProto.Dimension) -> str:
    """The name of an open dimension, where it has one that says anything."""
    return "" if dim.dim_param.strip() in ("", "?") else str(dim.dim_param)


def _shape(info: ValueInfoProto, symbols: Mapping[str, int]) -> tuple[int, ...]:
    """Sizes as far as they are known; -1 for an open dimension, however the file spells it (name, ``?``, 0, -1)."""
    sizes = []
    for dim in info.type.tensor_type.shape.dim:
        size = symbols.get(_symbol(dim), -1) if dim.dim_param else int(dim.dim_value)
        sizes.append(size if size > 0 else -1)
    return tuple(sizes)


def _open_axis(info: ValueInfoProto, symbols: Mapping[str, int]) -> str:
    """What is open about an input, in words; empty where nothing is."""
    if not info.type.tensor_type.HasField("shape"):
        return f'input "{info.name}" has no shape'
    shape = _shape(info, symbols)
    if -1 not in shape:
        return ""
    axis = shape.index(-1)
    dim = info.type.tensor_type.shape.dim[axis]
    name = f' "{dim.dim_param}"' if dim.dim_param else ""
    return f'input "{info.name}": dimension {axis}{name} has no fixed size'


def _all_sizes(infos: Sequence[ValueInfoProto], symbols: Mapping[str, int]) -> str:
    """The options that give every open input a size, ready to be typed."""
    return "give its size: " + " ".join(in_command(info.name, f":{_example(info, symbols)}") for info in infos)


def _meant(name: str, names: Sequence[str]) -> str:
    """The graph input that a user's spelling means: its own name, or the clean one."""
    spelled = dict(zip(clean_names(names, "input"), names, strict=True))
    if name in names or name not in spelled:
        _check_size_name(name, names)
        return name
    return spelled[name]


def _bind_symbols(info: ValueInfoProto, size: tuple[int, ...], symbols: dict[str, int]) -> None:
    if any(value < 0 for value in size):
        raise SourceError(f'input "{info.name}" cannot have the size {list(size)}', fix="sizes are 0 or more")
    if not info.type.tensor_type.HasField("shape"):
        return
    dims = info.type.tensor_type.shape.dim
    if len(dims) != len(size):
        raise SourceError(
            f'input "{info.name}" has {len(dims)} dimensions, the size given has {len(size)}',
            fix=f"for example {in_command(info.name, f':{_example(info, symbols)}')}",
        )
    for axis, (dim, value) in enumerate(zip(dims, size, strict=True)):
        name = _symbol(dim)
        fixed = symbols.setdefault(name, value) if name else dim.dim_value
        # Exporters write 0 or -1 where they mean "any".
        if fixed > 0 and fixed != value:
            shown = f' ("{name}")' if name else ""
            raise SourceError(
                f'input "{info.name}": dimension {axis}{shown} is {fixed}, not {value}',
                fix="leave the size out, or give the size that the graph was made for",
            )


def _check_size_name(name: str, names: Sequence[str]) -> None:
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


def _example(info: ValueInfoProto, symbols: Mapping[str, int]) -> str:
    """A size to show in an error: ``f32[1,3,224,224]`` with the open dimensions filled in."""
    tensor_type = info.type.tensor_type
    dtype = torch_dtype(tensor_type.elem_type, f'input "{info.name}"')
    dtype = torch.float32 if dtype == torch.float64 else dtype
    name = _SHORT.get(numpy_name(dtype), "f32")
    if not tensor_type.HasField("shape"):
        return f"{name}[1,3,224,224]"
    shape = _shape(info, symbols)
    guesses = [1, 3, 224, 224] if len(shape) == 4 else [1] + [128] * len(shape)
    if len(shape) == 4 and 0 < shape[3] <= 4:
        guesses = [1, 224, 224, shape[3]]
    shown = [size if size > 0 else guess for size, guess in zip(shape, guesses, strict=False)]
    # The first open dimension is the batch, unless axis 0 holds one already.
    if -1 in shape and shape[0] != 1:
        shown[shape.index(-1)] = 1
    return f"{name}[{','.join(str(size) for size in shown)}]"
