"""Some of the node tests that the onnx package carries; benchmarks/onnx_node_tests.py runs all of them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[3]


def _benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("onnx_node_tests", ROOT / "benchmarks" / "onnx_node_tests.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


#: Rounding of the last place beyond the tests' own tolerance: see docs/results/onnx-import.md.
ROUNDING = {
    "test_attention_4d_causal_fp16",
    "test_attention_4d_causal_fp16_expanded",
    "test_dft_inverse",
    "test_dft_inverse_opset19",
}


def test_a_sample_of_the_node_tests() -> None:
    benchmark = _benchmark()
    cases = [case for case in benchmark.node_cases() if case.name not in ROUNDING][::25]
    outcomes = [benchmark.run_case(case) for case in cases]
    failed = [f"{outcome.case.name}: {outcome.reason}" for outcome in outcomes if outcome.status == "failed"]
    assert not failed
    assert sum(outcome.status != "refused" for outcome in outcomes) > 0.8 * len(outcomes)


@pytest.mark.heavy
def test_all_node_tests_after_torch_export() -> None:
    benchmark = _benchmark()
    cases = [case for case in benchmark.node_cases() if case.name not in ROUNDING]
    outcomes = [benchmark.run_case(case, export=True) for case in cases]
    failed = [f"{outcome.case.name}: {outcome.reason}" for outcome in outcomes if outcome.status == "failed"]
    assert not failed
    assert sum(outcome.status == "refused" for outcome in outcomes) < 0.08 * len(outcomes)
