"""Inputs as people write them: ``name:f32[1,3,224,224]`` gives a size, ``name=16000`` fixes a value."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast, get_args

from edgeship.core.model import NUMPY_DTYPES, Dtype, TensorSpec
from edgeship.core.names import clean_name, in_shell, is_clean, quoted
from edgeship.core.units import human_bytes
from edgeship.errors import UsageError

if TYPE_CHECKING:
    import torch

# Protobuf and flatbuffers, which artifacts are made of, end at 2 GB; torch has at most 64 dimensions.
MAX_INPUT_BYTES = 2**31
MAX_DIMENSIONS = 32
ITEM_BYTES = {"f32": 4, "f16": 2, "i64": 8, "i32": 4, "i16": 2, "i8": 1, "u16": 2, "u8": 1, "bool": 1}
# A name is what stands before the last ":dtype[sizes]"; quotes around it are no part of it.
_SPEC = re.compile(r"^(?P<name>.*[^\s:].*?)\s*:\s*(?P<dtype>\w+)\s*\[(?P<sizes>[^\]]*)\]$", re.DOTALL)
_BETWEEN = re.compile(r"(?<=\])\s*[,;]\s*(?=\S)")
_FIXED = re.compile(r"^(?P<name>\"[^\"]+\"|'[^']+'|[^=]*[^=\s])\s*=\s*(?P<value>\S.*)$", re.DOTALL)
_EXAMPLE = "write name:f32[1,3,224,224]"
MAX_FIXED = 4096


@dataclass(frozen=True)
class Fixed:
    """An input that gets one value for good: ``values`` is a number, a truth value, or nested lists of them."""

    name: str
    values: Any


def parse_input(text: str) -> TensorSpec:
    """One ``--input`` that gives a size. Raises `UsageError` with the form and the list of dtypes."""
    match = _SPEC.match(text.strip())
    name = _unquoted(match["name"]) if match else ""
    if match is None or not name:
        raise UsageError(f"--input {_short(text)} is not name:dtype[sizes]", fix=_EXAMPLE)
    if match["dtype"] not in get_args(Dtype):
        raise UsageError(
            f"--input {_short(text)}: no dtype {match['dtype'][:40]}", fix=f"use {', '.join(get_args(Dtype))}"
        )
    sizes = [size for size in re.sub(r"\s", "", match["sizes"]).split(",") if size]
    if not all(size.isascii() and size.isdigit() and len(size) < 19 and int(size) > 0 for size in sizes):
        raise UsageError(f"--input {_short(text)}: sizes must be whole numbers above 0", fix=_EXAMPLE)
    spec = TensorSpec(name, match["dtype"], tuple(int(size) for size in sizes))  # type: ignore[arg-type]
    check_size(spec)
    return spec


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:60]}...{text[-10:]}")


def check_size(spec: TensorSpec) -> None:
    """Raise `UsageError` for an input that no artifact takes, before anything of its size is made."""
    size = math.prod(spec.shape) * ITEM_BYTES[spec.dtype]
    if size > MAX_INPUT_BYTES or len(spec.shape) > MAX_DIMENSIONS:
        shown = human_bytes(size) if size < 10**18 else f"10^{len(str(size)) - 1} bytes"
        raise UsageError(
            f"the input {_short(str(spec))} has {shown} in {len(spec.shape)} dimensions",
            fix=f"{human_bytes(MAX_INPUT_BYTES)} and {MAX_DIMENSIONS} dimensions is what files of models can hold",
        )


def parse_inputs(texts: Sequence[str]) -> list[TensorSpec]:
    """Every ``--input`` of a source whose inputs cannot be fixed, in order.

    Raises `UsageError` for a form nobody reads, a value, or a name given twice.
    """
    specs, fixed = split_inputs(texts)
    if fixed:
        raise UsageError(
            f"--input {quoted(fixed[0].name)}= fixes a value, which is for inputs of ONNX files",
            fix="let the factory's module hold the value",
        )
    return specs


def split_inputs(texts: Sequence[str]) -> tuple[list[TensorSpec], list[Fixed]]:
    """Sizes and fixed values, each in order. Raises `UsageError` for a form nobody reads, or a name given twice."""
    specs: list[TensorSpec] = []
    fixed: list[Fixed] = []
    for text in [part for given in texts for part in several(given)]:
        found = None if _SPEC.match(text.strip()) else _FIXED.match(text.strip())
        if found is None:
            specs.append(parse_input(text))
        else:
            fixed.append(Fixed(_unquoted(found["name"]), _value(text, found["value"])))
    names = [spec.name for spec in specs] + [item.name for item in fixed]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"two inputs are called {twice}", fix="give each --input a name of its own")
    return specs, fixed


def several(text: str) -> tuple[str, ...]:
    """The inputs that one text names with commas between, ``a:f32[1],b:f32[1]``; the text itself where it names one."""
    parts = tuple(_BETWEEN.split(text.strip().rstrip(",")))
    found = [_SPEC.match(part) for part in parts]
    known = all(match is not None and match["dtype"] in get_args(Dtype) for match in found)
    # Quotes that open in one part and close in another belong to a name with a comma in it.
    whole = all(part.count('"') % 2 == 0 and part.count("'") % 2 == 0 for part in parts)
    return parts if known and whole else (text,)


def spec_texts(inputs: Any) -> tuple[str, ...]:
    """Inputs given in Python as the command line writes them: texts stay, arrays by name become their size.

    A dict has by name a text (``"f32[1,3,224,224]"``), an example array or tensor, or a number that the input of an
    ONNX file gets for good.

    Raises:
        UsageError: of another form, or arrays without names.
    """
    if inputs is None:
        return ()
    if isinstance(inputs, str):
        return several(inputs)
    if isinstance(inputs, Mapping):
        return tuple(_spec_text(str(name), value) for name, value in inputs.items())
    if isinstance(inputs, Sequence) and all(isinstance(item, str) for item in inputs):
        return tuple(inputs)
    raise UsageError(
        "the inputs of a file need names", fix='write inputs={"image": example}, or "image:f32[1,3,224,224]"'
    )


def _spec_text(name: str, value: Any) -> str:
    if isinstance(value, str):
        return f"{quoted(name)}:{value}"
    if hasattr(value, "shape") and hasattr(value, "dtype") and value.shape != ():
        return str(TensorSpec(name, example_dtype(name, value), tuple(value.shape)))
    try:
        return f"{quoted(name)}={json.dumps(value.item() if hasattr(value, 'item') else value)}"
    except TypeError:
        raise UsageError(f"the input {name} is of type {type(value).__name__}", fix=_EXAMPLE) from None


def example_dtype(name: str, value: Any) -> Dtype:
    """The short dtype that a model takes of an example, an array or a tensor: floats of any width become f32.

    Raises:
        UsageError: no artifact takes such numbers.
    """
    text = str(value.dtype).removeprefix("torch.")
    if text in ("float64", "float16", "bfloat16"):
        return "f32"
    for short, numpy_name in NUMPY_DTYPES.items():
        if numpy_name == text:
            return cast("Dtype", short)
    raise UsageError(f"the input {name} holds {text}, which no artifact takes", fix="give float32 or int32")


def parse_renames(texts: Sequence[str]) -> dict[str, str]:
    """Every ``--input-name OLD=NEW``. Raises `UsageError` for another form, or a name that not every runtime takes."""
    renames: dict[str, str] = {}
    for text in texts:
        found = _FIXED.match(text.strip())
        if found is None:
            raise UsageError(f"--input-name {text!r} is not OLD=NEW", fix="write --input-name serving_x=image")
        old, new = _unquoted(found["name"]), found["value"].strip()
        check_name("--input-name", new, clean_name(new, "input"))
        if old in renames or new in renames.values():
            raise UsageError(f"--input-name {text!r}: that name was given before", fix="give each name once")
        renames[old] = new
    return renames


def check_name(option: str, name: str, instead: str) -> None:
    """Refuse a name of the user's own that some runtime does not take; a request is not changed quietly."""
    if not is_clean(name):
        raise UsageError(f"{option} {name!r} is not a name that every runtime accepts", fix=f"for example {instead}")


def with_notes(specs: Sequence[TensorSpec], notes: Mapping[str, Mapping[str, Any]]) -> tuple[TensorSpec, ...]:
    """Specs with another name, layout, range and normalisation, by the source's name or its clean spelling.

    Raises `UsageError` for a note on no input, or a name that another input has.
    """
    known = {clean_name(spec.name, "input"): spec.name for spec in specs} | {spec.name: spec.name for spec in specs}
    told: dict[str, dict[str, Any]] = {}
    for name, values in notes.items():
        if name not in known:
            listed = ", ".join(spec.name for spec in specs)
            raise UsageError(f"the model has no input {name}", fix=f"it has {listed}")
        told.setdefault(known[name], {}).update({key: _tuple(value) for key, value in values.items()})
    found = tuple(_noted(spec, told.get(spec.name, {})) for spec in specs)
    names = [spec.name for spec in found]
    for old, spec in zip(specs, found, strict=True):
        if spec.name != old.name and names.count(spec.name) > 1:
            raise UsageError(
                f"{old.name} cannot be called {spec.name}: another input has that name", fix="rename that one too"
            )
    return found


def _noted(spec: TensorSpec, values: dict[str, Any]) -> TensorSpec:
    name = values.pop("name", None)
    if name is None or name == spec.name:
        return replace(spec, **values)
    return replace(spec, **values, name=name, source=spec.name)


def in_command(name: str, size: str) -> str:
    """``--input NAME:SIZE`` (or ``=VALUE``) as it can be typed into a shell."""
    return f"--input {in_shell(quoted(name) + size)}"


def example_tensors(specs: Sequence[TensorSpec], seed: int = 0) -> tuple[torch.Tensor, ...]:
    """One generated tensor a spec, to trace with. Each has its spec's shape."""
    import torch

    from edgeship.core.model import Signature
    from edgeship.data.batches import generate_batches

    for spec in specs:
        check_size(spec)
    batch = generate_batches(Signature(tuple(specs), ()), 1, seed)[0]
    return tuple(torch.from_numpy(batch[spec.name].copy()) for spec in specs)


def _unquoted(name: str) -> str:
    name = name.strip()
    if len(name) > 2 and name[0] == name[-1] and name[0] in "\"'":
        return name[1:-1]
    return name


def _value(text: str, value: str) -> Any:
    """A number, ``true``, ``false``, or nested lists of them. Raises `UsageError`."""
    fix = "write name=16000, name=0.5, name=true or name=[1,2]"
    try:
        found = json.loads(value, parse_constant=_no_number) if len(value) <= MAX_FIXED else None
    except (ValueError, RecursionError):
        found = None
    pending, depth = [found], 0
    while pending:
        depth += 1
        if depth > MAX_FIXED or not all(isinstance(item, (bool, int, float, list)) for item in pending):
            raise UsageError(f"--input {text[:80]!r} is neither name:dtype[sizes] nor name=value", fix=fix)
        pending = [inner for item in pending if isinstance(item, list) for inner in item]
    return found


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is not a value for an input")


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
