"""The plans of two samples, as people read it. A refactor must plan the same steps.

When a plan was meant to change: ``EDGESHIP_UPDATE_GOLDEN=1 make test`` (or pytest tests/golden), then read the diff.
"""

import os
from pathlib import Path

import pytest

PLANS = Path(__file__).parent / "plans"
ORDERS = {
    "iphone15pro": ("samples/digits_cnn", "--target", "iphone15pro"),
    "galaxy-s24": ("samples/digits_cnn", "--target", "galaxy-s24"),
    "both_fast": ("samples/digits_cnn", "--target", "iphone15pro", "--target", "galaxy-s24", "--profile", "fast"),
    "storyteller": ("samples/storyteller", "--target", "iphone15pro", "--profile", "small", "--context", "256"),
}


@pytest.mark.parametrize("name", ORDERS)
def test_the_plan_is_the_same(name, root, cli):
    ran = cli("plan", *ORDERS[name], cwd=root)
    assert ran.code == 0, ran.err
    path = PLANS / f"{name}.txt"
    if os.environ.get("EDGESHIP_UPDATE_GOLDEN"):
        path.write_text(ran.out, encoding="utf-8")
    assert ran.out == path.read_text(encoding="utf-8"), "EDGESHIP_UPDATE_GOLDEN=1 writes the plan anew"


def test_every_golden_plan_is_checked():
    assert {path.stem for path in PLANS.iterdir()} == set(ORDERS)
