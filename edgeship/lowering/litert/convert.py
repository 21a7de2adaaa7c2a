"""Run the LiteRT converter on a module, and turn its failures into errors that name the operator."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

from edgeship.errors import EdgeshipError, LoweringError, UnsupportedOpError
from edgeship.program.provenance import where

if TYPE_CHECKING:
    from ai_edge_litert import schema_py_generated as schema

    from edgeship.lowering.litert.opened import OpenedProgram

SIGNATURE_KEY = "serving_default"


def convert(signatures: Mapping[str, OpenedProgram]) -> bytes:
    """The float ``.tflite`` of modules by signature, weights still inputs; named ``args_0`` ... and ``output_0`` ...

    Raises:
        UnsupportedOpError: an operator has no LiteRT form; the message names it and where it sits.
        LoweringError: anything else that the converter refuses.
    """
    import torch
    from litert_torch import Converter

    from edgeship.compat.litert import converting
    from edgeship.compat.torch import quick_decompositions
    from edgeship.lowering.litert.rewrites import hide_left_constants, rewrite_for_litert

    converter = Converter()
    for key, opened in signatures.items():
        rewrite_for_litert(opened.module)
        converter.signature(key, opened.module, opened.examples)
    try:
        with torch.no_grad(), quick_decompositions(), converting(hide_left_constants):
            return cast("bytes", converter.convert().model_content())
    except Exception as error:
        raise _explain(error, list(signatures.values())) from error


def refuse_unrunnable(model: schema.ModelT) -> None:
    """Raise `UnsupportedOpError` for operators that the format has and the interpreter lacks."""
    from ai_edge_litert import schema_py_generated as schema

    names = {number: name for name, number in vars(schema.BuiltinOperator).items() if isinstance(number, int)}
    for code in model.operatorCodes:
        name = names[max(code.builtinCode, code.deprecatedBuiltinCode)]
        if name.startswith("STABLEHLO_") and name not in _STABLEHLO_KERNELS:
            raise UnsupportedOpError(f"LiteRT's interpreter does not run {name}", fix=_FIX)


# Registered in ai-edge-litert 2.3.0's builtin resolver.
_STABLEHLO_KERNELS = {
    "STABLEHLO_ADD", "STABLEHLO_MULTIPLY", "STABLEHLO_MAXIMUM", "STABLEHLO_MINIMUM", "STABLEHLO_SCATTER",
    "STABLEHLO_GATHER", "STABLEHLO_REDUCE_WINDOW", "STABLEHLO_PAD", "STABLEHLO_COMPOSITE", "STABLEHLO_CASE",
    "STABLEHLO_SHIFT_LEFT", "STABLEHLO_RNG_BIT_GENERATOR", "STABLEHLO_AND",
}  # fmt: skip
_FIX = "write it with other operators, or leave LiteRT out with --runtime"


def _place_named(text: str, signatures: list[OpenedProgram]) -> str:
    """Where in the model the converter was, as far as its message names a node: `` at ...``, or nothing."""
    named = re.search(r"While executing %(\S+) ", text)
    if named is None:
        return ""
    for opened in signatures:
        for node in opened.module.graph.nodes:
            if node.name == named[1]:
                return f" at {where(node)}"
    return f" at node {named[1]}"


def _explain(error: Exception, signatures: list[OpenedProgram]) -> EdgeshipError:
    text = "\n".join(str(item) for item in (error, error.__cause__) if item)
    place = _place_named(text, signatures)
    for pattern in (r"Lowering not found: (\S+)", r"failed to legalize operation '([\w.]+)'"):
        if unknown := re.search(pattern, text):
            return UnsupportedOpError(f"LiteRT has no form of {unknown[1]}{place}", fix=_FIX)
    first = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    return LoweringError(f"the LiteRT converter failed{place}: {first[:300]}", fix="leave LiteRT out with --runtime")
