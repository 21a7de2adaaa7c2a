"""Runs a saved mlprogram on any machine, one operation after another."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeship.errors import ArtifactError, DataError, UnsupportedOpError
from edgeship.runtimes.coreml.constants import Constants
from edgeship.runtimes.coreml.packed import Packed
from edgeship.runtimes.coreml.program import (
    Block,
    Constant,
    Function,
    Operation,
    Port,
    Program,
    Reference,
    load_program,
)
from edgeship.runtimes.coreml.values import Feature, closed, fitted, rounded, to_numpy, to_value

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor

    from edgeship.runtimes.coreml.ops import Value
    from edgeship.runtimes.coreml.series import Stage


def supported_ops() -> frozenset[str]:
    """The MIL operations the evaluator knows, ``const`` included."""
    from edgeship.runtimes.coreml.ops import OPERATIONS

    return frozenset(OPERATIONS) | {"const"}


class Evaluator:
    """Runs a saved mlprogram op by op, rounding every op's result to the type the program declares.

    An operation computes in float32 from its float16 inputs, sums in float32 as the Neural Engine does, and its result
    is rounded once to float16; what is too large becomes infinite, as it does on a device.
    """

    def __init__(self, package: Path, function: str | None = None, beside: Evaluator | None = None) -> None:
        """Reads ``package`` and decompresses the constants of ``function`` (default: the package's own).

        Constants that it shares with ``beside``, another function of the same package, are not held twice.

        Raises ArtifactError if a file is damaged or missing, UnsupportedOpError if an operation is not known.
        """
        program = load_program(Path(package)) if beside is None else beside.program
        self.program: Program = program
        name = function or program.default_function
        if name not in program.functions:
            raise ArtifactError(f"{package} has no function {name!r}", fix=f"it has {', '.join(program.functions)}")
        self.name = name
        self.function_names: tuple[str, ...] = tuple(program.functions)
        self._function = program.functions[name]
        self._check_known(self._function)
        self.inputs: tuple[Feature, ...] = tuple(
            _feature(port, self._default_shape(port)) for port in self._function.inputs if port.type.kind != "state"
        )
        self.states: tuple[Feature, ...] = tuple(_feature(port) for port in self._function.states)
        # An output may be an input that is passed on.
        ports = {port.name: port for port in self._function.inputs}
        for operation in self._function.block.operations:
            ports.update((port.name, port) for port in operation.outputs)
        self.outputs: tuple[Feature, ...] = tuple(_feature(ports[name]) for name in self._function.block.outputs)
        self._shared: Constants = Constants.of(program) if beside is None else beside._shared
        self._stages: tuple[Stage, ...] | None = None
        self._literals: dict[int, Value] = {}
        self._constants: dict[str, Any] = {}
        self._fold(self._function.block)
        self._constant_ids = {id(value) for value in (*self._constants.values(), *self._literals.values())}
        self._last_use = {id(block): _last_uses(block) for block in _all_blocks(self._function.block)}

    def new_state(self) -> dict[str, npt.NDArray[Any]]:
        """The states as they are before a first run: zeros, by name. Shapes are the program's."""
        import numpy as np

        return {s.name: np.zeros(closed(s), s.dtype) for s in self.states}

    def run(
        self, inputs: Mapping[str, npt.NDArray[Any]], state: dict[str, npt.NDArray[Any]] | None = None
    ) -> dict[str, npt.NDArray[Any]]:
        """Runs the function once; ``state`` (from ``new_state``) is updated in place when the run has succeeded.

        Arrays are converted to the declared types. Raises DataError if a name, shape or type does not fit.
        A classifier's label is an array of no axes, its probabilities an array in the order of the labels.
        """
        states = self._given_states(state)
        results = self.advance(inputs, states)
        if state is not None:
            state.update({name: tensor.numpy().copy() for name, tensor in states.items()})
        return results

    def advance(self, inputs: Mapping[str, npt.NDArray[Any]], states: dict[str, Tensor]) -> dict[str, npt.NDArray[Any]]:
        """As `run`, with states as tensors that are replaced in the dictionary as the program goes, never copied.

        Shapes are the program's.
        """
        import torch

        if self._shared.lean:
            return self.advance_all([inputs], states)[0]
        values = self._values(inputs, states)
        with torch.no_grad():
            results = self._run_block(self._function.block, values, states)
        return {f.name: to_numpy(result) for f, result in zip(self.outputs, results, strict=True)}

    def advance_all(
        self, inputs: Sequence[Mapping[str, npt.NDArray[Any]]], states: dict[str, Tensor]
    ) -> list[dict[str, npt.NDArray[Any]]]:
        """As `advance` for one after another, each operation for all before the next: large weights are decompressed
        once for all of them.

        Shapes are the program's.
        """
        import torch

        from edgeship.runtimes.coreml.series import run_stages, stages

        if self._stages is None:
            self._stages = stages(self._function.block)
        runs = [self._values(given, states) for given in inputs]
        with torch.no_grad():
            run_stages(self._stages, runs, lambda o, values: self._execute(o, values, states), self._together)
        answers: list[dict[str, npt.NDArray[Any]]] = []
        for values in runs:
            answers.append({feature.name: to_numpy(values[feature.name]) for feature in self.outputs})
        return answers

    def _values(self, inputs: Mapping[str, npt.NDArray[Any]], states: Mapping[str, Tensor]) -> dict[str, Any]:
        """What a run begins with. A state goes by its name, so that it is looked up when an operation runs."""
        return {**self._constants, **self._given_inputs(inputs), **{name: name for name in states}}

    def _together(self, operation: Operation, runs: Sequence[dict[str, Any]]) -> bool:
        """One operation with a packed weight on all runs, by rows of the weight; False when it is no such product."""
        from edgeship.runtimes.coreml.series import multiply

        first = self._arguments(operation, runs[0])
        weight = first.get("x" if operation.kind == "gather" else "weight", [None])[0]
        if not isinstance(weight, Packed):
            return False
        if operation.kind == "gather":
            if any(int(first[name][0]) for name in ("axis", "batch_dims") if name in first):
                return False
            indices = [self._arguments(operation, values)["indices"][0] for values in runs]
            made = [weight.take(index).reshape(*index.shape, *weight.shape[1:]) for index in indices]
        else:
            bias = first["bias"][0].float() if "bias" in first else None
            inputs = [self._arguments(operation, values)["x"][0].float() for values in runs]
            products = multiply(operation, inputs, weight, bias)
            if products is None:
                return False
            made = products
        (port,) = operation.outputs
        for values, value in zip(runs, made, strict=True):
            values[port.name] = rounded(operation, port, value)
        return True

    def _default_shape(self, port: Port) -> tuple[int, ...] | None:
        known = tuple(size for size in port.type.shape if size is not None)
        if len(known) == len(port.type.shape):
            return known
        return self._function.default_shapes.get(port.name)

    @staticmethod
    def _check_known(function: Function) -> None:
        known = supported_ops()
        for operation in function.block.walk():
            if operation.kind not in known:
                raise UnsupportedOpError(
                    f"Core ML operation {operation.label} in function {function.name} is not known to the evaluator",
                    fix="verify this package on a Mac, or add the operation to edgeship/runtimes/coreml/ops",
                )

    def _decompressed(self, operation: Operation, stored: Sequence[Constant]) -> list[Value]:
        self._literals.update({id(constant): to_value(constant.read()) for constant in stored})
        self._execute(operation, self._constants, {})
        # What only served this operation would be held twice: packed and decompressed.
        for constant in stored:
            del self._literals[id(constant)]
        return [self._constants[port.name] for port in operation.outputs]

    def _fold(self, block: Block) -> None:
        """Decodes constants and runs the constexpr operations: once, here, not in every run."""
        for operation in block.operations:
            for operand in (o for operands in operation.inputs.values() for o in operands):
                if isinstance(operand, Constant) and not operation.is_constant:
                    self._literals[id(operand)] = to_value(operand.read())
            if operation.kind == "const":
                self._constants[operation.outputs[0].name] = self._shared.plain(operation)
            elif operation.kind.startswith("constexpr_"):
                made = self._shared.compressed(operation, functools.partial(self._decompressed, operation))
                self._constants.update(zip([port.name for port in operation.outputs], made, strict=True))
            for nested in operation.blocks:
                self._fold(nested)

    def _given_inputs(self, inputs: Mapping[str, npt.NDArray[Any]]) -> dict[str, Value]:
        """The inputs in the program's types and shapes; refused where one is missing or too many."""
        expected = {f.name for f in self.inputs}
        if set(inputs) != expected:
            raise DataError(f"inputs {sorted(inputs)} where the model takes {sorted(expected)}", fix="name them so")
        return {f.name: fitted(f, inputs[f.name]) for f in self.inputs}

    def _given_states(self, state: dict[str, npt.NDArray[Any]] | None) -> dict[str, Tensor]:
        """The states in the program's types and shapes; refused where one is missing or too many."""
        expected = {s.name for s in self.states}
        if set(state or ()) != expected:
            raise DataError(
                f"the model keeps the states {sorted(expected)}, given are {sorted(state or ())}",
                fix="pass state=evaluator.new_state() and keep it from run to run",
            )
        return {s.name: fitted(s, (state or {})[s.name]) for s in self.states}

    def _run_block(self, block: Block, values: dict[str, Value], states: dict[str, Tensor]) -> list[Value]:
        last_use = self._last_use[id(block)]
        for index, operation in enumerate(block.operations):
            if operation.is_constant:
                continue
            self._execute(operation, values, states)
            for name in last_use.get(index, ()):
                values.pop(name, None)
        return [values[name] for name in block.outputs]

    def _execute(self, operation: Operation, values: dict[str, Value], states: dict[str, Tensor]) -> None:
        from edgeship.runtimes.coreml.ops import OPERATIONS, Call

        def run_block(block: Block, arguments: Sequence[Value]) -> list[Value]:
            inner = dict(values)
            inner.update({port.name: value for port, value in zip(block.inputs, arguments, strict=True)})
            return self._run_block(block, inner, states)

        call = Call(operation, self._arguments(operation, values), self._function.opset, run_block, states, self._widen)
        try:
            results = OPERATIONS[operation.kind](call)
        except (RuntimeError, IndexError, ValueError) as error:
            raise ArtifactError(f"{operation.label} fails: {error}", fix="build the package again") from error
        outputs = results if isinstance(results, tuple) else (results,)
        if len(outputs) != len(operation.outputs):
            raise ArtifactError(
                f"{operation.label} declares {len(operation.outputs)} outputs and has {len(outputs)}",
                fix="build the package again",
            )
        for port, value in zip(operation.outputs, outputs, strict=True):
            values[port.name] = rounded(operation, port, value)

    def _widen(self, tensor: Tensor) -> Tensor:
        """Any shape."""
        return self._shared.widen(tensor, id(tensor) in self._constant_ids)

    def _arguments(self, operation: Operation, values: Mapping[str, Any]) -> dict[str, list[Any]]:
        """What an operation reads, by parameter; variadic parameters have several."""
        arguments: dict[str, list[Any]] = {}
        for name, operands in operation.inputs.items():
            arguments[name] = [self._operand(operand, values) for operand in operands]
        return arguments

    def _operand(self, operand: Any, values: Mapping[str, Any]) -> Any:
        return values[operand.name] if isinstance(operand, Reference) else self._literals[id(operand)]


def _feature(port: Port, default_shape: tuple[int, ...] | None = None) -> Feature:
    return Feature(port.name, port.type.shape, port.type.dtype, default_shape)


def _all_blocks(block: Block) -> list[Block]:
    """``block`` and every block inside it: branches and the bodies of loops."""
    found = [block]
    for operation in block.operations:
        for inner in operation.blocks:
            found += _all_blocks(inner)
    return found


def _last_uses(block: Block) -> dict[int, list[str]]:
    """The values that can be dropped after each operation of ``block``: made there, and not used later."""
    last: dict[str, int] = {}
    made: set[str] = set()
    for index, operation in enumerate(block.operations):
        if operation.kind == "const" or operation.kind.startswith("constexpr_"):
            continue
        made |= {port.name for port in operation.outputs}
        for name in operation.names_used():
            last[name] = index
    uses: dict[int, list[str]] = {}
    for name, index in last.items():
        if name in made and name not in block.outputs:
            uses.setdefault(index, []).append(name)
    return uses
