"""Run the LiteRT converter on a module, and turn its failures into errors that name the operator."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, cast

from edgeship.errors import EdgeshipError, LoweringError, UnsupportedOpError

if TYPE_CHECKING:
    from edgeship.lowering.litert.opened import OpenedProgram

SIGNATURE_KEY = "serving_default"


def convert(opened: OpenedProgram) -> bytes:
    """The float ``.tflite`` of a module, weights still inputs; named ``args_0`` ... and ``output_0`` ...

    Raises:
        UnsupportedOpError: an operator has no LiteRT form; the message names it and where it sits.
        LoweringError: anything else that the converter refuses.
    """
    import litert_torch
    import torch

    try:
        with torch.no_grad():
            model = litert_torch.signature(SIGNATURE_KEY, opened.module, opened.examples).convert()
            return cast("bytes", model.model_content())
    except Exception as error:
        raise _explain(error) from error


def _explain(error: Exception) -> EdgeshipError:
    text = "\n".join(str(item) for item in (error, error.__cause__) if item)
    where = re.search(r"While executing %(\S+) ", text)
    place = f" at node {where.group(1)}" if where else ""
    unknown = re.search(r"Lowering not found: (\S+)", text) or re.search(
        r"failed to legalize operation '([\w.]+)'", text
    )
    if unknown:
        return UnsupportedOpError(
            f"LiteRT has no form of {unknown.group(1)}{place}",
            fix="write it with other operators, or leave out --runtime tflite",
        )
    first = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    return LoweringError(f"the LiteRT converter failed{place}: {first[:300]}", fix="leave out --runtime tflite")
