from __future__ import annotations

import pytest

from edgeship.core.weights import Affine, Float
from edgeship.lowering.onnx.options import ACCURACY_LEVEL, FOLD_WEIGHTS, session_options


@pytest.mark.parametrize(
    ("encodings", "static", "activations", "wanted"),
    [
        ([], False, "float", {}),
        ([Float(16)], False, "dynamic", {}),
        ([Affine(8), Float(16)], False, "float", {FOLD_WEIGHTS: "1"}),
        ([Affine(4)], False, "float", {ACCURACY_LEVEL: "1"}),
        ([Affine(4), Affine(8)], False, "float", {FOLD_WEIGHTS: "1"}),
        ([Affine(8)], False, "dynamic", {ACCURACY_LEVEL: "4"}),
        ([Affine(8)], True, "int8", {ACCURACY_LEVEL: "1"}),
    ],
)
def test_what_an_app_must_set(encodings, static, activations, wanted):
    assert session_options(encodings, static, activations) == wanted
