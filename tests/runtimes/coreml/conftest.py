"""Builds tiny mlprograms with coremltools, saves them, and runs them in the evaluator."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgeship.runtimes.coreml.evaluator import Evaluator
from edgeship.runtimes.coreml.ops import OPERATIONS, Call
from edgeship.runtimes.coreml.program import Operation, Port, ValueType


@pytest.fixture(scope="session")
def ct() -> Any:
    """coremltools, silenced."""
    tools = pytest.importorskip("coremltools")
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    return tools


@dataclass
class Builder:
    """Makes packages in one folder."""

    ct: Any
    folder: Path
    count: int = 0

    def save(self, build: Any, specs: dict[str, tuple[Any, ...]], opset: str = "iOS17") -> Path:
        """``build(**vars)`` as a package; ``specs`` gives (shape, numpy type) by input name."""
        from coremltools.converters.mil.mil import Builder as mb
        from coremltools.converters.mil.mil import Function, Program, types

        target = getattr(self.ct.target, opset)
        program = Program()
        placeholders = {
            name: mb.placeholder(shape=shape, dtype=types.numpy_type_to_builtin_type(np.dtype(dtype).type))
            for name, (shape, dtype) in specs.items()
        }
        with Function(placeholders, opset_version=target) as function:
            made = build(**function.inputs)
            function.set_outputs(list(made) if isinstance(made, (list, tuple)) else [made])
            program.add_function("main", function)
        return self.convert(program, opset)

    def convert(self, program: Any, opset: str) -> Path:
        self.count += 1
        model = self.ct.convert(
            program,
            convert_to="mlprogram",
            minimum_deployment_target=getattr(self.ct.target, opset),
            pass_pipeline=self.ct.PassPipeline.EMPTY,
            skip_model_load=True,
        )
        path = self.folder / f"model{self.count}.mlpackage"
        model.save(str(path))
        return path

    def run(self, build: Any, inputs: dict[str, np.ndarray], opset: str = "iOS17") -> list[np.ndarray]:
        """The outputs of ``build`` on ``inputs``, whose shapes and types the program takes."""
        path = self.save(build, {name: (x.shape, x.dtype) for name, x in inputs.items()}, opset)
        return list(Evaluator(path).run(inputs).values())


@pytest.fixture
def builder(ct: Any, tmp_path: Path) -> Builder:
    return Builder(ct, tmp_path)


def apply(kind: str, opset: int = 7, outputs: int = 1, **arguments: Any) -> Any:
    """One operation called directly, without a program around it; arrays and Python values become arguments."""

    def value(given: Any) -> Any:
        return given if isinstance(given, (str, torch.Tensor)) else torch.from_numpy(np.asarray(given))

    given = {
        name: [value(v) for v in (argument if isinstance(argument, tuple) else (argument,))]
        for name, argument in arguments.items()
        if argument is not None
    }
    first = next(v for values in given.values() for v in values if isinstance(v, torch.Tensor))
    shape: tuple[None, ...] = (None,) * first.dim()
    ports = tuple(Port(f"out{i}", ValueType("tensor", "float32", shape)) for i in range(outputs))
    call = Call(Operation(kind, {}, ports), given, opset, lambda block, values: [], {})
    result = OPERATIONS[kind](call)
    return [r.numpy() for r in result] if isinstance(result, tuple) else result.numpy()  # type: ignore[union-attr]


@pytest.fixture(scope="session")
def call_op() -> Any:
    return apply
