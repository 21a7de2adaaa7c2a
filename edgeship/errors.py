"""Every error edgeship raises on purpose, on one page.

    EdgeshipError            1   base; never raised itself
    |- GateError             1   a check fell short: verify, accuracy or size; nothing is published
    |- UsageError            2   the command or an option is wrong
    |- SourceError           3   the model cannot be read
    |  |- UnsafeSourceError  3   reading it would run code, or leave its folder
    |  `- WeightsError       3   a weight is missing, of another shape, or not finite
    |- ChangedError          3   a file changed while the build read it
    |- DataError             3   calibration or evaluation data does not fit the model
    |- UnsupportedOpError    4   an operator that a frontend, converter or evaluator does not know
    |- LoweringError         4   a converter failed, or did not store what was decided
    |- EncodingError         5   a runtime cannot hold the encoding that was asked for
    |- MissingToolError      6   a package for a runtime is not installed
    |- OutputError           7   the output cannot be written: permission, full disk, not a bundle
    `- ArtifactError         8   an artifact or bundle is damaged

An error says what happened, why, and what to do next: ``what`` is the sentence, ``fix`` the way out.
Exit code 70 means a bug in edgeship; the traceback is in the log file.
"""

from __future__ import annotations

from typing import ClassVar


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
    """A check fell short; the bundle is not published."""


class UsageError(EdgeshipError):
    """The command line, or an option in a call, is wrong."""

    exit_code = 2


class SourceError(EdgeshipError):
    """The model cannot be read."""

    exit_code = 3


class UnsafeSourceError(SourceError):
    """Reading the model would run code or leave its folder."""


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
