"""One step: run it or take it from the cache, check its promise, and say what an error in it means."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from edgeship.core.model import Model, Source
from edgeship.core.passes import Context, Pass
from edgeship.core.plan import Step
from edgeship.engine.cache import Cache, Result, result_kinds
from edgeship.engine.chatter import Log, silenced
from edgeship.engine.outside import Outside
from edgeship.errors import ChangedError, DataError, EdgeshipError, OutputError, UsageError, meaning_of

# A disk with less than this is full: no artifact fits.
FULL_BYTES = 1 << 20

# Runs a pass on its inputs in an empty folder, with its promise checked; here or in another process.
Runner = Callable[[Step, Mapping[str, Model], Path], Result]


def run_step(
    step: Step, source: Source, cache: Cache, results: Mapping[int, Result], run: Runner
) -> tuple[Result, bool]:
    """The result of a step, and whether it came from the cache.

    Args:
        results: of the steps before it, by index.
    """
    inputs = {name: _input(index, source, results) for name, index in step.inputs.items()}
    key = cache.key(step.task, {name: model.digest for name, model in inputs.items()})
    if step.task.cached:
        found = cache.get(key)
        if found is not None:
            return found, True
    outside = Outside(step.task, inputs)
    outside.begin()
    folder = cache.scratch(key)
    try:
        result = run(step, inputs, folder)
        if result_kinds().get(type(result).kind) is not type(result):
            raise TypeError(f"{step.name} made a {type(result).__name__}, which is not something a pass can make")
        # Only what was read as it was named goes in under that name.
        outside.end()
        for model in inputs.values():
            cache.check(model)
        return cache.put(key, folder, result), False
    except (EdgeshipError, OSError):
        raise
    except Exception as error:
        # Libraries that write in C++ or Rust have errors of their own for a full disk.
        if "No space left" in str(error) or is_full(cache.root):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(cache.root)) from error
        raise
    finally:
        cache.discard(folder)


def run_pass(task: Pass, inputs: Mapping[str, Model], context: Context, log: Log) -> Result:
    """Run a pass in this process, with what libraries print sent to the log."""
    with silenced(log):
        result: Result = task.run(**inputs, ctx=context)
        task.ensures(result, **inputs)
    return result


def _input(index: int, source: Source, results: Mapping[int, Result]) -> Model:
    if index < 0:
        return source
    result = results[index]
    assert isinstance(result, Model), "only models flow between steps"
    return result


def is_of_a_route(failure: BaseException) -> bool:
    """Whether another route may go on: not after Ctrl-C, a wrong order, data that do not fit, or a full disk."""
    of_the_order = (UsageError, DataError, ChangedError, OutputError)
    return isinstance(failure, Exception) and not isinstance(failure, of_the_order)


def is_full(place: Path) -> bool:
    """Whether a disk has no room for anything."""
    try:
        return shutil.disk_usage(place).free < FULL_BYTES
    except OSError:
        return False


def told(error: BaseException, name: str, root: Path) -> BaseException:
    """What a failure of a step means where the machine is the reason; the error itself where it stands as it is.

    Args:
        name: of the pass. root: the folder of the cache.
    """
    if isinstance(error, OSError) and not isinstance(error, EdgeshipError) and error.errno is not None:
        return _disk_error(error, root)
    return meant(error, name)


def meant(error: BaseException, name: str) -> BaseException:
    """An error of memory, depth or libraries, as a sentence on the pass that met it; others as they are."""
    if isinstance(error, EdgeshipError) or (isinstance(error, OSError) and error.errno is not None):
        return error
    limit = meaning_of(error)
    return error if limit is None else type(limit)(f"{name}: {limit.what}", fix=limit.fix)


def _disk_error(error: OSError, root: Path) -> EdgeshipError:
    place = error.filename2 or error.filename or root
    if error.errno == errno.ENOSPC:
        return OutputError(f"no space left on the disk of {place}", fix="free some, or set EDGESHIP_CACHE elsewhere")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return OutputError(f"{place} cannot be written: {error.strerror}", fix="choose another -o or EDGESHIP_CACHE")
    return OutputError(f"{place}: {error.strerror or error}", fix="see the log file")
