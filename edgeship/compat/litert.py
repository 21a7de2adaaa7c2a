"""What edgeship takes from LiteRT's packages that they do not document. Written for litert-torch 0.10.0,
litert-converter 0.5.0 and litert-lm-builder 0.18.1.

It ends when litert-torch converts ``topk`` and ``sort``, keeps the sides of a difference, and writes caches in place
by itself; and when litert-lm-builder names its file format's reader in its documentation.
"""

from __future__ import annotations

import importlib
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from edgeship.compat.exchange import exchanged

if TYPE_CHECKING:
    import torch

__all__ = [
    "converting",
    "metadata_proto",
    "mlir",
    "product_of_rows",
    "sampler_proto",
    "section_reader",
    "section_schema",
    "stablehlo",
    "tfl_operators",
    "write_slice",
]


def tfl_operators() -> Any:
    """``torch.ops.tfl``, registered: LiteRT's own operators, which the converter keeps as they are."""
    import torch

    importlib.import_module("litert_torch.backend.experimental.torch_tfl")
    return torch.ops.tfl


@contextmanager
def converting(touch: Callable[[Any], object]) -> Iterator[None]:
    """Programs that the converter lowers inside, in this thread, are given to a function before it goes on with them.

    The converter leaves torch's loggers alone: by itself it sets their levels and takes their handlers away, for good.

    Args:
        touch: gets the MLIR module, and may change it.
    """
    from litert_torch import fx_infra
    from litert_torch.backend import export

    plain, here = export.exported_program_to_mlir, threading.get_ident()

    def touched(*args: Any, **kwargs: Any) -> Any:
        lowered = plain(*args, **kwargs)
        if threading.get_ident() == here:
            touch(lowered.module)
        return lowered

    quiet = exchanged(fx_infra, "silence_torch_logs", lambda: None)
    with exchanged(export, "exported_program_to_mlir", touched), quiet:
        yield


def mlir() -> types.ModuleType:
    """MLIR's classes, as the converter has them."""
    return importlib.import_module("litert_converter.mlir.ir")


def stablehlo() -> types.ModuleType:
    """The operations of StableHLO, which the converter lowers to."""
    return importlib.import_module("litert_converter.mlir.dialects.stablehlo")


def write_slice(whole: torch.Tensor, part: torch.Tensor, starts: Sequence[torch.Tensor]) -> torch.Tensor:
    """``DYNAMIC_UPDATE_SLICE``: a tensor with a part of it written over, from a place on each axis on."""
    from litert_torch.generative.custom_ops.dynamic_update_slice import dynamic_update_slice

    return cast("torch.Tensor", dynamic_update_slice(whole, part, list(starts)))


def product_of_rows(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``[1, H, M, K]`` by the rows of ``[1, H, N, K]``: ``[1, H, M, N]``, the right side read as it lies."""
    from litert_torch.generative.custom_ops.bmm_4d import bmm_4d

    return cast("torch.Tensor", bmm_4d(left, right))


def section_reader() -> types.ModuleType:
    """How a ``.litertlm`` file's sections are told apart, read and written."""
    return importlib.import_module("litert_lm_builder.litertlm_core")


def section_schema() -> types.ModuleType:
    """The flatbuffers of a ``.litertlm`` file's header."""
    return importlib.import_module("litert_lm_builder.litertlm_header_schema_py_generated")


def metadata_proto() -> types.ModuleType:
    """The protobuf of a language model's tokens and templates."""
    return importlib.import_module("litert_lm_builder.runtime.proto.llm_metadata_pb2")


def sampler_proto() -> types.ModuleType:
    """The protobuf of how an engine draws the next token."""
    return importlib.import_module("litert_lm_builder.runtime.proto.sampler_params_pb2")
