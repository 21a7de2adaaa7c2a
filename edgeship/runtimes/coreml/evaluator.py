"""Runs a saved mlprogram on any machine, one operation after another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeship.errors import ArtifactError, DataError, UnsupportedOpError
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

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    from edgeship.runtimes.coreml.ops import Value

#: Constants that are kept in float32 as well, so that a run need not widen them: at most this much.
MAX_WIDENED_BYTES = 1 << 30


@dataclass(frozen=True)
class Feature:
    """An input, output or state: ``shape`` has None where the size is only known when the program runs.

    An image input is the tensor that the program itself takes: (1, channels, height, width), values 0 to 255.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: str
    default_shape: tuple[int, ...] | None = None  #: the shape to take for an input of flexible size


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
            Feature(p.name, p.type.shape, p.type.dtype, self._default_shape(p))
            for p in self._function.inputs
            if p.type.kind != "state"
        )
        self.states: tuple[Feature, ...] = tuple(
            Feature(p.name, p.type.shape, p.type.dtype) for p in self._function.states
        )
        ports = {p.name: p for p in self._function.inputs}
        ports |= {p.name: p for operation in self._function.block.operations for p in operation.outputs}
        self.outputs: tuple[Feature, ...] = tuple(
            Feature(n, ports[n].type.shape, ports[n].type.dtype) for n in self._function.block.outputs
        )
        self._shared: _Shared = _Shared() if beside is None else beside._shared
        self._literals: dict[int, Value] = {}
        self._constants: dict[str, Value] = {}
        self._fold(self._function.block)
        self._constant_ids = {id(value) for value in (*self._constants.values(), *self._literals.values())}
        self._last_use = {id(block): _last_uses(block) for block in _all_blocks(self._function.block)}

    def new_state(self) -> dict[str, npt.NDArray[Any]]:
        """The states as they are before a first run: zeros, by name."""
        import numpy as np

        return {s.name: np.zeros(_closed(s), s.dtype) for s in self.states}

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
        """As `run`, with states as tensors that are replaced in the dictionary as the program goes, never copied."""
        import torch

        values = dict(self._constants)
        values.update(self._given_inputs(inputs))
        # A state goes by its name, so that it is looked up when an operation runs.
        values.update({name: name for name in states})
        with torch.no_grad():
            results = self._run_block(self._function.block, values, states)
        return {f.name: _to_numpy(result) for f, result in zip(self.outputs, results, strict=True)}

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

    def _read(self, operation: Operation) -> Value:
        """A plain constant, unless it was read for another function."""
        (stored,) = operation.inputs["val"]
        assert isinstance(stored, Constant)
        if stored.location is None:
            return _to_value(stored.read())
        kept = self._shared.constants
        key = _key(operation)
        if key not in kept:
            kept[key] = [_to_value(stored.read())]
        return kept[key][0]

    def _decompress(self, operation: Operation) -> None:
        """Runs a constexpr operation, unless it was run for another function."""
        operands = [operand for operands in operation.inputs.values() for operand in operands]
        stored = [operand for operand in operands if isinstance(operand, Constant)]
        whole = len(stored) == len(operands) and all(constant.location for constant in stored)
        kept = self._shared.constants
        key = _key(operation)
        names = [port.name for port in operation.outputs]
        if whole and key in kept:
            self._constants.update(zip(names, kept[key], strict=True))
            return
        self._literals.update({id(constant): _to_value(constant.read()) for constant in stored})
        self._execute(operation, self._constants, {})
        # What only served this operation would be held twice: packed and decompressed.
        for constant in stored:
            del self._literals[id(constant)]
        if whole:
            kept[key] = [self._constants[name] for name in names]

    def _fold(self, block: Block) -> None:
        """Decodes constants and runs the constexpr operations: once, here, not in every run."""
        for operation in block.operations:
            for operand in (o for operands in operation.inputs.values() for o in operands):
                if isinstance(operand, Constant) and not _is_constant(operation):
                    self._literals[id(operand)] = _to_value(operand.read())
            if operation.kind == "const":
                self._constants[operation.outputs[0].name] = self._read(operation)
            elif operation.kind.startswith("constexpr_"):
                self._decompress(operation)
            for nested in operation.blocks:
                self._fold(nested)

    def _given_inputs(self, inputs: Mapping[str, npt.NDArray[Any]]) -> dict[str, Value]:
        expected = {f.name for f in self.inputs}
        if set(inputs) != expected:
            raise DataError(f"inputs {sorted(inputs)} where the model takes {sorted(expected)}", fix="name them so")
        return {f.name: _fit(f, inputs[f.name]) for f in self.inputs}

    def _given_states(self, state: dict[str, npt.NDArray[Any]] | None) -> dict[str, Tensor]:
        expected = {s.name for s in self.states}
        if set(state or ()) != expected:
            raise DataError(
                f"the model keeps the states {sorted(expected)}, given are {sorted(state or ())}",
                fix="pass state=evaluator.new_state() and keep it from run to run",
            )
        return {s.name: _fit(s, (state or {})[s.name]) for s in self.states}

    def _run_block(self, block: Block, values: dict[str, Value], states: dict[str, Tensor]) -> list[Value]:
        last_use = self._last_use[id(block)]
        for index, operation in enumerate(block.operations):
            if _is_constant(operation):
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

        arguments = {
            name: [values[o.name] if isinstance(o, Reference) else self._literals[id(o)] for o in operands]
            for name, operands in operation.inputs.items()
        }
        call = Call(operation, arguments, self._function.opset, run_block, states, self._widen)
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
            values[port.name] = _round(operation, port, value)

    def _widen(self, tensor: Tensor) -> Tensor:
        """``tensor`` as float32; a constant is widened once, within MAX_WIDENED_BYTES."""
        import torch

        if tensor.dtype == torch.float32:
            return tensor
        shared = self._shared
        if id(tensor) in shared.widened:
            return shared.widened[id(tensor)][1]
        wide = tensor.to(torch.float32)
        size = wide.numel() * 4
        if id(tensor) in self._constant_ids and shared.widened_bytes + size <= MAX_WIDENED_BYTES:
            shared.widened[id(tensor)] = tensor, wide
            shared.widened_bytes += size
        return wide


@dataclass
class _Shared:
    """What functions of one package hold together: constants by where they lie, and float32 forms by identity.

    The tensor that a float32 form belongs to is kept with it, so that its identity is not given away again.
    """

    constants: dict[tuple[Any, ...], list[Value]] = field(default_factory=dict)
    widened: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    widened_bytes: int = 0


def _key(operation: Operation) -> tuple[Any, ...]:
    """What tells constants apart: the operation, where its operands lie, and what it gives."""
    places = tuple(
        (name, operand.location, operand.type)
        for name, operands in operation.inputs.items()
        for operand in operands
        if isinstance(operand, Constant)
    )
    return (operation.kind, places, tuple(port.type for port in operation.outputs))


def _is_constant(operation: Operation) -> bool:
    return operation.kind == "const" or operation.kind.startswith("constexpr_")


def _round(operation: Operation, port: Port, value: Value) -> Value:
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


def _fit(feature: Feature, given: npt.NDArray[Any]) -> Tensor:
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


def _to_value(read: np.ndarray[Any, Any] | str | list[Any]) -> Value:
    import numpy as np
    import torch

    if isinstance(read, np.ndarray):
        return torch.from_numpy(read)
    if isinstance(read, list) and read and isinstance(read[0], np.ndarray):
        return torch.from_numpy(np.stack(read))
    return read


def _to_numpy(value: Value) -> npt.NDArray[Any]:
    import numpy as np
    from torch import Tensor

    if isinstance(value, Tensor):
        return value.contiguous().numpy().copy()
    if isinstance(value, str):
        return np.array(value)
    raise UnsupportedOpError("the program answers with a list", fix="only tensors and labels are read")


def _closed(feature: Feature) -> tuple[int, ...]:
    return tuple(1 if size is None else size for size in feature.shape)


def _all_blocks(block: Block) -> list[Block]:
    return [block, *(b for o in block.operations for nested in o.blocks for b in _all_blocks(nested))]


def _last_uses(block: Block) -> dict[int, list[str]]:
    """The values that can be dropped after each operation of ``block``: made there, and not used later."""
    last: dict[str, int] = {}
    made: set[str] = set()
    for index, operation in enumerate(block.operations):
        if operation.kind == "const" or operation.kind.startswith("constexpr_"):
            continue
        made |= {port.name for port in operation.outputs}
        for name in _names_used(operation):
            last[name] = index
    uses: dict[int, list[str]] = {}
    for name, index in last.items():
        if name in made and name not in block.outputs:
            uses.setdefault(index, []).append(name)
    return uses


def _names_used(operation: Operation) -> set[str]:
    names = {o.name for operands in operation.inputs.values() for o in operands if isinstance(o, Reference)}
    for block in operation.blocks:
        names |= set(block.outputs)
        for nested in block.operations:
            names |= _names_used(nested)
    return names
