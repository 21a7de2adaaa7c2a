from __future__ import annotations

import logging
import threading
import types

import pytest

from edgeship.compat.exchange import exchanged, log_level


def library() -> types.ModuleType:
    made = types.ModuleType("library")
    made.number = 1
    return made


@pytest.mark.parametrize("fails", [False, True])
def test_what_was_exchanged_is_put_back(fails) -> None:
    module = library()
    try:
        with exchanged(module, "number", 2), exchanged(module, "number", 3):
            assert module.number == 3
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert vars(module)["number"] == 1


def test_what_is_not_there_is_an_error_and_not_added() -> None:
    module = library()
    with pytest.raises(AttributeError, match="nothing"), exchanged(module, "nothing", 2):
        pass
    assert not hasattr(module, "nothing")


def test_an_inherited_attribute_is_not_exchanged() -> None:
    class Base:
        number = 1

    class Sub(Base):
        pass

    with pytest.raises(AttributeError), exchanged(Sub, "number", 2):
        pass
    assert "number" not in vars(Sub)


def test_blocks_in_threads_do_not_overlap() -> None:
    module = library()
    wrong = []

    def change(own: int) -> None:
        for _ in range(200):
            with exchanged(module, "number", own):
                wrong.extend([module.number] * (module.number != own))

    threads = [threading.Thread(target=change, args=(own,)) for own in (2, 3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert module.number == 1


LOGGER = logging.getLogger("edgeship_test.logger")


@pytest.mark.parametrize("own", [logging.NOTSET, logging.DEBUG])
@pytest.mark.parametrize("fails", [False, True])
def test_a_logger_has_its_own_level_again(own, fails) -> None:
    LOGGER.setLevel(own)
    try:
        with log_level(LOGGER.name, logging.ERROR):
            assert LOGGER.level == logging.ERROR
            with log_level(LOGGER.name, logging.CRITICAL):
                assert LOGGER.level == logging.CRITICAL
            assert LOGGER.level == logging.ERROR
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert LOGGER.level == own


def test_levels_may_end_in_any_order() -> None:
    LOGGER.setLevel(logging.INFO)
    one, other = log_level(LOGGER.name, logging.ERROR), log_level(LOGGER.name, logging.CRITICAL)
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert LOGGER.level == logging.CRITICAL
    other.__exit__(None, None, None)
    assert LOGGER.level == logging.INFO
