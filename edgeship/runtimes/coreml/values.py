"""Arrays into the values that operations take, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeship.errors import DataError, UnsupportedOpError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    from edgeship.runtimes.coreml.ops import Value
    from edgeship.runtimes.coreml.program import Operation, Port


@dataclass(frozen=True)
class Feature:
    """An input, output or state: ``shape`` has None where the size is only known when the program runs.

    An image input is the tensor that the program itself takes: (1, channels, height, width), values 0 to 255.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: str
    default_shape: tuple[int, ...] | None = None  #: the shape to take for an input of flexible size


def rounded(operation: Operation, port: Port, value: Value) -> Value:
    """``value`` in the declared type; its shape has to be the declared one."""
    from torch import Tensor

    from edgeship.runtimes.coreml.ops.registry import TORCH_DTYPES

    if not isinstance(value, Tensor) or port.type.kind != "tensor":
        return value
    declared = port.type.shape
    if not port.type.any_rank and not _matches(declared, value.shape):
        raise UnsupportedOpError(
            f"{operation.label} gives the shape {tuple(value.shape)} where the program declares {declared}",
            fix="report it with the package: either the file or the evaluator is wrong",
        )
    return value.to(TORCH_DTYPES[port.type.dtype])


def _matches(declared: Sequence[int | None], shape: Sequence[int]) -> bool:
    return len(declared) == len(shape) and all(a in (None, b) for a, b in zip(declared, shape, strict=True))


def fitted(feature: Feature, given: npt.NDArray[Any]) -> Tensor:
    """What was given for an input, in its type. Raises `DataError` when the shape or the type does not fit."""
    import numpy as np
    import torch

    from edgeship.runtimes.coreml.ops.registry import TORCH_DTYPES

    array = np.asarray(given)
    if not _matches(feature.shape, array.shape):
        raise DataError(f"{feature.name} has the shape {array.shape}", fix=f"the model takes {feature.shape}")
    if array.dtype.kind == "f" and "int" in feature.dtype:
        raise DataError(f"{feature.name} is {array.dtype}", fix=f"the model takes {feature.dtype}")
    if array.dtype.kind not in "fiub":
        raise DataError(f"{feature.name} is {array.dtype}", fix=f"the model takes {feature.dtype}")
    return torch.from_numpy(np.array(array)).to(TORCH_DTYPES[feature.dtype])


def to_value(read: np.ndarray[Any, Any] | str | list[Any]) -> Value:
    """A decoded constant as operations take it. Any shape."""
    import numpy as np
    import torch

    if isinstance(read, np.ndarray):
        return torch.from_numpy(read)
    if isinstance(read, list) and read and isinstance(read[0], np.ndarray):
        return torch.from_numpy(np.stack(read))
    return read


def to_numpy(value: Value) -> npt.NDArray[Any]:
    """An output as an array of its own. Any shape."""
    import numpy as np
    from torch import Tensor

    if isinstance(value, Tensor):
        return value.contiguous().numpy().copy()
    if isinstance(value, str):
        return np.array(value)
    raise UnsupportedOpError("the program answers with a list", fix="only tensors and labels are read")


def closed(feature: Feature) -> tuple[int, ...]:
    """The shape with open sizes as one."""
    return tuple(1 if size is None else size for size in feature.shape)
