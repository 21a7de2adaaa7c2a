from __future__ import annotations

import gc

import pytest

from edgeship.program.collector import few_collections


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_stays_frozen(fails) -> None:
    before = gc.get_freeze_count()  # Python 3.12 has frozen a few objects of its own
    assert before < 2000
    try:
        with few_collections():
            assert gc.get_freeze_count() > 2000
            with few_collections():
                pass
            assert gc.get_freeze_count() > 2000
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert gc.get_freeze_count() <= before


def test_what_others_froze_stays_frozen() -> None:
    gc.freeze()
    try:
        with few_collections():
            pass
        assert gc.get_freeze_count() > 2000
    finally:
        gc.unfreeze()
