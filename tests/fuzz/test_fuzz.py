"""Bad inputs of every kind end in one line: no exit 70, no code, nothing outside of -o, nothing lost, in time and memory.

``EDGESHIP_FUZZ_SEED`` and ``EDGESHIP_FUZZ_CASES`` draw others; a failure names its kind and seed, which
``EDGESHIP_FUZZ_ONLY="kind:seed"`` runs alone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
from cases import KINDS, Bundles, makers
from harness import Child, run_case

CASES = int(os.environ.get("EDGESHIP_FUZZ_CASES", "400"))
SEED = int(os.environ.get("EDGESHIP_FUZZ_SEED", "0"))
ONLY = os.environ.get("EDGESHIP_FUZZ_ONLY", "")
SLICE = 30


@pytest.fixture
def child(tmp_path: Path, tiny_bundle: Path) -> Iterator[Child]:
    Bundles.small = tiny_bundle
    made = Child(tmp_path)
    yield made
    made.stop()


def run_all(child: Child, base: Path, count: int, seed: int) -> list[str]:
    cases = makers(count, seed)
    if ONLY:
        kind, _, number = ONLY.rpartition(":")
        cases = [(kind, int(number), KINDS[kind])]
    found = []
    for kind, number, maker in cases:
        problem = run_case(child, base, maker, number)
        if problem:
            found.append(f"{kind}:{number}: {problem}")
            print(found[-1], flush=True)
    return found


def test_some_cases_of_each_kind(child: Child, tmp_path: Path) -> None:
    assert run_all(child, tmp_path, SLICE, SEED) == []


@pytest.mark.heavy
@pytest.mark.timeout(3600)
def test_four_hundred_cases(child: Child, tmp_path: Path) -> None:
    assert run_all(child, tmp_path, CASES, SEED) == []
