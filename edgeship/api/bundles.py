"""A bundle in Python: its artifacts by runtime, open sessions, figures, and the report of its build."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeship.api import checking
from edgeship.api.table import failed_runtimes, failures, first_failure, report_html, report_lines
from edgeship.core.artifact import REPORT, ArtifactRecord
from edgeship.core.model import TensorSpec
from edgeship.core.records import read_json, suggest
from edgeship.core.registry import runtimes
from edgeship.core.report import ArtifactRow, Measurement, Report
from edgeship.errors import BUG, FaultError, GateError, UsageError

if TYPE_CHECKING:
    from edgeship.api.sessions import LanguageModel, Network
    from edgeship.core.device import TextOrder


class Bundle:
    """The folder that ships, or the report of a build that fell short of a check.

    ``bundle["tflite"]`` is an artifact by its runtime, ``for artifact in bundle`` all of them. Files are read when they
    are asked for, and checked against their digests before they are opened.
    """

    def __init__(self, path: Path, report: Report | None = None) -> None:
        self._path, self._report = path, report
        self._records: tuple[ArtifactRecord, ...] | None = None

    @classmethod
    def built(cls, path: Path, report: Report) -> Bundle:
        """What a build ended in. ``path``: where the bundle is, when the report says that it passed."""
        bundle = cls(path, report)
        if report.passed:
            # Now, before another build puts its own there.
            bundle._read_records()
        return bundle

    @property
    def report(self) -> Report:
        """What the build decided and measured."""
        if self._report is None:
            self._report = read_json(Report, self._path / REPORT)
        return self._report

    @property
    def passed(self) -> bool:
        """Whether every artifact that was asked for was made, and every check held."""
        return self.report.passed

    @property
    def published(self) -> bool:
        """Whether there is a folder: with all artifacts, or with those that passed (`reasons` says what is missing)."""
        return bool(self.report.bundle)

    @property
    def reasons(self) -> tuple[str, ...]:
        """What is missing and why: one sentence for each check that fell short and each runtime that took no part."""
        return tuple(failures(self.report))

    def require(self) -> Bundle:
        """The bundle itself. Raises `GateError` when an artifact is missing or a check fell short."""
        if self.passed:
            return self
        what, fix = first_failure(self.report)
        others = dict.fromkeys(name for name in failed_runtimes(self.report)[1:])
        what += f"; {', '.join(others)} failed too (reasons says why)" if others else ""
        shipped = ", ".join(dict.fromkeys(row.runtime for row in self.report.rows if row.passed))
        rest = f"{shipped} published without it" if self.published else "nothing was published"
        faults = any(refusal.exit_code == BUG for refusal in self.report.refused)
        raise (FaultError if faults else GateError)(f"{what}; {rest}", fix=fix)

    @property
    def path(self) -> Path:
        """The folder. Raises `GateError` when nothing was published."""
        if not self.published:
            self.require()
        return self._path

    @property
    def artifacts(self) -> tuple[BundleArtifact, ...]:
        """Every artifact, in the order of the plan. Raises `GateError` when nothing was published."""
        return tuple(BundleArtifact(self, record) for record in self._read_records())

    def _read_records(self) -> tuple[ArtifactRecord, ...]:
        from edgeship.shipping.bundle import read_bundle

        if self._records is None:
            self._records = read_bundle(self.path).manifest.artifacts
        return self._records

    def __getitem__(self, name: str) -> BundleArtifact:
        """An artifact by its runtime, by the format of its runtime (``onnx`` for ``genai``), or by its folder."""
        found = self._named(name)
        if len(found) > 1:
            raise UsageError(
                f"{self._path} has {len(found)} artifacts for {name}",
                fix=f"name one: {', '.join(a.name for a in found)}",
            )
        if not found:
            known = [artifact.name for artifact in self.artifacts]
            raise UsageError(f"{self._path} has nothing for {name}", fix=suggest(str(name), known))
        return found[0]

    def _named(self, name: str) -> list[BundleArtifact]:
        """Artifacts under a name: a folder's own comes before a runtime's, and that before a format's."""
        for names in (lambda a: a.name, lambda a: a.runtime, lambda a: runtimes()[a.runtime].format.name):
            found = [artifact for artifact in self.artifacts if names(artifact) == name]
            if found:
                return found
        return []

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and bool(self._named(name))

    def __iter__(self) -> Iterator[BundleArtifact]:
        return iter(self.artifacts)

    def __len__(self) -> int:
        return len(self.artifacts)

    def verify(self, *, run: bool = True) -> list[str]:
        """Check every byte against the manifest, and that every artifact runs here: one sentence a problem."""
        return checking.verify(self.path, run=run)

    def bench(
        self, *, device: str = "host", seconds: float = 2.0, text: TextOrder | None = None
    ) -> list[tuple[str, Measurement]]:
        """The figures of every artifact on a device, see `edgeship.bench`."""
        return checking.bench(self.path, seconds=seconds, device=device, text=text)

    def inspect(self) -> dict[str, Any]:
        """Inputs, outputs, bytes and error by encoding and by layer, as plain data."""
        from edgeship.shipping.inspection import inspect_path

        return inspect_path(self.path)

    def __repr__(self) -> str:
        return "\n".join([f"<Bundle {self._path}>", *report_lines(self.report)])

    def _repr_html_(self) -> str:
        return report_html(self.report, str(self._path))


class BundleArtifact:
    """One artifact of a bundle: a model in a runtime's format, with what the build said of it."""

    def __init__(self, bundle: Bundle, record: ArtifactRecord) -> None:
        self.bundle, self.record = bundle, record

    @property
    def name(self) -> str:
        """Its folder in the bundle: the runtime, with targets where two would share it."""
        return self.record.main.split("/")[0]

    @property
    def runtime(self) -> str:
        """The runtime that opens it."""
        return self.record.runtime

    @property
    def targets(self) -> tuple[str, ...]:
        """The devices it was built for."""
        return self.record.targets

    @property
    def path(self) -> Path:
        """The file or folder that an app opens."""
        return self.bundle.path / self.record.main

    @property
    def size_bytes(self) -> int:
        """Bytes of all its files."""
        return sum(file.bytes for file in self.record.files)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What it takes, in order."""
        return self.record.signature.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What it answers, in order."""
        return self.record.signature.outputs

    @property
    def row(self) -> ArtifactRow:
        """Its line of the report: size, encodings, verdicts and every figure."""
        mine = ",".join(self.targets)
        rows = self.bundle.report.rows
        return next(row for row in rows if row.runtime == self.runtime and row.target == mine)

    def open(self, *, adapter: str = "") -> Network | LanguageModel:
        """Open it in its engine, as an app does: `Network.__call__` takes inputs, `LanguageModel.generate` a prompt.

        Args:
            adapter: of a language model: the adapter that ships beside it; the base alone when empty.

        Raises:
            ArtifactError: a file was changed, or another build replaced the bundle.
            MissingToolError: the engine is not installed.
        """
        from edgeship.api.sessions import open_artifact

        return open_artifact(self.bundle.path, self.record, adapter)

    def bench(self, *, device: str = "host", seconds: float = 2.0, text: TextOrder | None = None) -> list[Measurement]:
        """Its figures on a device, see `edgeship.bench`."""
        rows = checking.bench(self.bundle.path, seconds=seconds, device=device, text=text, only=self.record.main)
        return [measured for _, measured in rows]

    def __repr__(self) -> str:
        takes = ", ".join(map(str, self.inputs))
        gives = ", ".join(map(str, self.outputs))
        return f"<BundleArtifact {self.record.main}: {takes} -> {gives}>"


def open_bundle(path: str | os.PathLike[str]) -> Bundle:
    """A bundle that was built before. Raises `ArtifactError` when the folder is none."""
    from edgeship.shipping.bundle import read_bundle

    place = Path(path)
    read_bundle(place)
    return Bundle(place)
