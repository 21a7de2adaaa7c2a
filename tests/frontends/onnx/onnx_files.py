"""Builds small ONNX files and runs them three ways: imported, exported, and with ONNX Runtime."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper

from edgeship.frontends.onnx.importer import ImportedOnnx, import_onnx

ROOT = Path(__file__).resolve().parents[3]
SHARED = Path(os.environ.get("EDGESHIP_SHARED", ROOT.parent / "shared"))


def save_model(
    path: Path,
    nodes: Sequence[NodeProto],
    inputs: Mapping[str, np.ndarray],
    outputs: Sequence[str],
    weights: Mapping[str, np.ndarray] | None = None,
    *,
    opset: int = 18,
    domains: Mapping[str, int] | None = None,
    functions: Sequence[onnx.FunctionProto] = (),
) -> Path:
    """Write a model whose inputs have the shapes and dtypes of the given arrays."""
    graph = helper.make_graph(
        list(nodes),
        "test",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
            for name, value in inputs.items()
        ],
        [helper.make_empty_tensor_value_info(name) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in (weights or {}).items()],
    )
    imports = [helper.make_opsetid("", opset)]
    imports += [helper.make_opsetid(domain, version) for domain, version in (domains or {}).items()]
    model = helper.make_model(graph, opset_imports=imports, functions=list(functions), ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def run_module(imported: ImportedOnnx, inputs: Mapping[str, np.ndarray], *, export: bool = False) -> list[np.ndarray]:
    """Outputs of the imported module, or of its exported program."""
    arguments = tuple(torch.from_numpy(inputs[info.name]) for info in imported.inputs)
    module = imported.module
    if export:
        module = torch.export.export(module, arguments, strict=False).module()
    with torch.no_grad():
        return [value.numpy() for value in module(*arguments)]


def run_onnxruntime(path: Path, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """What ONNX Runtime answers."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(inputs))


def assert_matches_onnxruntime(
    path: Path, inputs: Mapping[str, np.ndarray], *, atol: float = 1e-5, export: bool = False
) -> ImportedOnnx:
    """Import, run, and compare every output with ONNX Runtime."""
    imported = import_onnx(path)
    expected = run_onnxruntime(path, inputs)
    for got, want in zip(run_module(imported, inputs, export=export), expected, strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=atol)
    return imported


def floats(*shape: int, seed: int = 0) -> np.ndarray:
    """Normal float32 numbers, the same for the same shape and seed."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def ints(*values: int) -> np.ndarray:
    """An int64 vector."""
    return np.array(values, dtype=np.int64)


__all__ = ["SHARED", "TensorProto", "assert_matches_onnxruntime", "floats", "ints", "run_module", "save_model"]
