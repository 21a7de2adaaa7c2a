from __future__ import annotations

import gc

import pytest

from edgeship.program.collector import few_collections


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_stays_frozen(fails) -> None:
    assert gc.get_freeze_count() == 0
    try:
        with few_collections():
            assert gc.get_freeze_count() > 0
            with few_collections():
                pass
            assert gc.get_freeze_count() > 0
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert gc.get_freeze_count() == 0


def test_what_others_froze_stays_frozen() -> None:
    gc.freeze()
    try:
        with few_collections():
            pass
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
