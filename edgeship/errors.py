"""Every error edgeship raises on purpose, on one page.

    EdgeshipError            1   base; never raised itself
    |- GateError             1   a check fell short (verify, accuracy or size), or a runtime took no part
    |  `- FaultError        70   a runtime took no part because of a fault of edgeship's own
    |- UsageError            2   the command or an option is wrong
    |  `- NoRouteError       2   no passes lead from the source to the artifact of a runtime
    |- SourceError           3   the model cannot be read
    |  |- UnsafeSourceError  3   reading it would run code, or leave its folder
    |  |- OpenSizeError      3   a size or a branch depends on the values of an input
    |  `- WeightsError       3   a weight is missing, of another shape, or not finite
    |- ChangedError          3   a file changed while the build read it
    |- DataError             3   calibration or evaluation data does not fit the model
    |- UnsupportedOpError    4   an operator that a frontend, converter or evaluator does not know
    |- LoweringError         4   a converter failed, or did not store what was decided
    |- EncodingError         5   a runtime cannot hold the encoding that was asked for
    |- MissingToolError      6   a package for a runtime is not installed
    |- OutputError           7   the output cannot be written: permission, full disk, not a bundle
    |- ArtifactError         8   an artifact or bundle is damaged
    `- LimitError            9   it would take more memory, depth or steps than there are: a bomb, 100,000 layers

An error says what happened, why, and what to do next: ``what`` is the sentence, ``fix`` the way out.
Exit code 70 means a bug in edgeship, or in a plug-in, which the message names; the traceback is in the log file. What
the machine cannot do, wherever it shows (`meaning_of`), is none: memory that is not there, structures nested too
deeply, a library that does not load.
"""

from __future__ import annotations

import re
from typing import ClassVar

# The exit code of what is our own fault.
BUG = 70


class EdgeshipError(Exception):
    """Base of all errors raised on purpose. ``str()`` is one line: what, then the way out."""

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, fix: str = "") -> None:
        self.what = " ".join(what.split())
        self.fix = " ".join(fix.split())
        super().__init__(self.what)

    def __str__(self) -> str:
        return f"{self.what}; {self.fix}" if self.fix else self.what


class GateError(EdgeshipError):
    """A check fell short, or a runtime took no part; what held is published all the same where no limit forbids it."""


class FaultError(GateError):
    """A runtime took no part in a build because of a fault of edgeship's own; the others went on."""

    exit_code = BUG


class UsageError(EdgeshipError):
    """The command line, or an option in a call, is wrong."""

    exit_code = 2


class NoRouteError(UsageError):
    """No passes lead from the source to the artifact of a runtime."""


class SourceError(EdgeshipError):
    """The model cannot be read."""

    exit_code = 3


class UnsafeSourceError(SourceError):
    """Reading the model would run code or leave its folder."""


class OpenSizeError(SourceError):
    """A size or a branch of the model depends on the values of an input, and cannot be made fixed."""


class WeightsError(SourceError):
    """A weight is missing, has another shape, or is not finite."""


class ChangedError(EdgeshipError):
    """A source, data or an entry of the cache changed while a build read it; nothing of what was read is kept."""

    exit_code = 3


class DataError(EdgeshipError):
    """Calibration or evaluation data does not fit the model."""

    exit_code = 3


class UnsupportedOpError(EdgeshipError):
    """An operator that a frontend, a converter or an evaluator does not know."""

    exit_code = 4


class LoweringError(EdgeshipError):
    """A converter failed, or did not store what was decided."""

    exit_code = 4


class EncodingError(EdgeshipError):
    """A runtime cannot hold the encoding that was asked for."""

    exit_code = 5


class MissingToolError(EdgeshipError):
    """A package that a runtime needs is not installed."""

    exit_code = 6


class OutputError(EdgeshipError):
    """The output cannot be written."""

    exit_code = 7


class ArtifactError(EdgeshipError):
    """An artifact or a bundle is damaged."""

    exit_code = 8


class LimitError(EdgeshipError):
    """It would take more memory, depth or steps than there are."""

    exit_code = 9


# What libraries in C++ and Rust say when memory is not there; they have errors of their own for it.
_NO_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|out of memory|bad_alloc|Cannot allocate memory|Unable to allocate"
    r"|bad allocation|Failed to allocate memory",
    re.IGNORECASE,
)
_WANTED = re.compile(r"allocate (\d+) bytes|allocate ([\d.]+ [KMGTPE]i?B)")
_NO_LIBRARY = re.compile(
    r"cannot open shared object|undefined symbol|DLL load failed|GLIBC|invalid ELF header|image not found"
)


def meaning_of(error: BaseException) -> EdgeshipError | None:
    """What a failure outside of our own code means for the user; None when it is nothing of the machine's.

    The one place for it: memory that is not there, recursion, numbers of too many digits, and libraries that do not
    load, under whatever error a library wraps them in.
    """
    seen: BaseException | None = error
    for _ in range(20):
        if seen is None:
            break
        found = _meaning(seen)
        if found is not None:
            return found
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    return None


def _meaning(error: BaseException) -> EdgeshipError | None:
    if isinstance(error, EdgeshipError):
        return error if isinstance(error, LimitError) else None
    text = str(error)
    if isinstance(error, MemoryError) or _NO_MEMORY.search(text):
        size = ""
        if wanted := _WANTED.search(text):
            size = f": {wanted[1]} bytes at once" if wanted[1] else f": {wanted[2]} at once"
        return LimitError(f"it needs more memory than there is{size}", fix="give a smaller model or smaller inputs")
    if isinstance(error, RuntimeError) and text.strip() == "ZeroDivisionError":
        # torch's kernels; a division of ours raises Python's own.
        return SourceError(
            "the model divides integers by zero on generated inputs",
            fix="state the input's range in a sample.toml: low and high",
        )
    if isinstance(error, RecursionError):
        return LimitError("something in the input is nested too deeply", fix="give a flatter one")
    if isinstance(error, (ImportError, OSError)) and _NO_LIBRARY.search(text):
        reason = " ".join(text.split())[:200]
        return MissingToolError(
            f"a library does not load: {reason}", fix="install its package again; see edgeship doctor"
        )
    if isinstance(error, ImportError) and not (error.name or "").startswith("edgeship"):
        reason = " ".join(text.split())[:200]
        return MissingToolError(f"a package does not load: {reason}", fix="install it again; see edgeship doctor")
    if isinstance(error, ValueError) and "Exceeds the limit" in text and "digits" in text:
        return UsageError("a number has more digits than any limit has", fix="write fewer")
    if isinstance(error, ValueError) and "embedded null" in text:
        return UsageError("a path holds a zero byte", fix="check the paths")
    if isinstance(error, OSError) and error.filename is not None:
        return SourceError(f"{str(error.filename)[:200]}: {error.strerror}", fix="check the path and its permissions")
    return None
