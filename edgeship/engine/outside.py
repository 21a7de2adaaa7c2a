"""What a step reads besides the results of other steps: the source, data, adapters, weights that stay where they were.

Their digests are taken when the build is planned, and are part of the keys in the cache. Whoever writes to such a file
between that and the end of the reading would have the result of one model kept under the name of another. So each
step is asked before and after: the files hold what was planned, and nothing touched them meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from edgeship.core.artifact import script_digest, source_digest
from edgeship.core.model import Model, Source, TorchModel
from edgeship.core.passes import Pass
from edgeship.core.profile import AdapterRef, DataRef
from edgeship.core.stamps import Stamp, moved, stamps
from edgeship.engine.sources import source_state
from edgeship.errors import ChangedError, EdgeshipError

_DIGEST = "_digest"
_ADVICE = "wait until it is written, and run the same command again"


@dataclass(frozen=True)
class Claim:
    """Something outside the cache that a step reads.

    Args:
        name: what to call it. digest: as planned. now: its digest, and the files that it is over, at this moment.
    """

    name: str
    digest: str
    now: Callable[[], tuple[str, list[Path]]]


class Outside:
    """Everything that one step reads outside the cache, looked at before and after it runs."""

    def __init__(self, task: Pass, inputs: Mapping[str, Model]) -> None:
        self._claims = [*_of_inputs(inputs), *_of_task(task)]
        self._stamps: dict[Path, Stamp] = {}

    def begin(self) -> None:
        """Raise `ChangedError` unless everything is as planned."""
        # Stamps come first: what changes from here on shows in `end`.
        for claim in self._claims:
            self._stamps |= stamps(_state(claim)[1])
        self._compare()

    def end(self) -> None:
        """Raise `ChangedError` when anything was touched since `begin`."""
        self._compare()
        path = moved(self._stamps)
        if path is not None:
            raise ChangedError(f"{path} changed while the build read it", fix=_ADVICE)

    def _compare(self) -> None:
        for claim in self._claims:
            if _state(claim)[0] != claim.digest:
                raise ChangedError(f"{claim.name} changed while the build read it", fix=_ADVICE)


def _state(claim: Claim) -> tuple[str, list[Path]]:
    try:
        return claim.now()
    except (OSError, EdgeshipError):
        raise ChangedError(f"{claim.name} can no longer be read", fix=_ADVICE) from None


def _of_inputs(inputs: Mapping[str, Model]) -> Iterator[Claim]:
    from edgeship.program.stored import outside_files

    for model in inputs.values():
        if isinstance(model, Source):
            # One that no file stands for: of a plug-in, or of a module on Python's path.
            if model.path.exists() or model.form == "torch":
                yield Claim(model.reference, model.digest, lambda source=model: source_state(source))  # type: ignore[misc]
        elif isinstance(model, TorchModel):
            for file, digest in outside_files(model.path).items():
                yield _of_file(file, digest)


def _of_file(file: Path, digest: str) -> Claim:
    return Claim(str(file), digest, lambda: (source_digest(file), [file]))


def _of_task(task: Pass) -> Iterator[Claim]:
    for field in fields(task):  # type: ignore[arg-type]
        value = getattr(task, field.name)
        for item in value if isinstance(value, tuple) else (value,):
            # One without a digest is not data but the name of a function.
            if isinstance(item, DataRef) and item.digest and Path(item.reference).exists():
                yield _of_data(item)
            elif isinstance(item, AdapterRef):
                yield _of_adapter(Path(item.folder), item.digest)
        named = getattr(task, field.name.removesuffix(_DIGEST), "")
        if field.name.endswith(_DIGEST) and value and named:
            yield _of_adapter(Path(named), value) if Path(named).is_dir() else _of_script(str(named), value)


def _of_data(data: DataRef) -> Claim:
    from edgeship.data.batches import data_files, describe_data

    return Claim(
        data.reference, data.digest, lambda: (describe_data(data.reference).digest, data_files(Path(data.reference)))
    )


def _of_adapter(folder: Path, digest: str) -> Claim:
    from edgeship.frontends.lora import CONFIGURATION, WEIGHTS, adapter_digest

    return Claim(str(folder), digest, lambda: (adapter_digest(folder), [folder / CONFIGURATION, folder / WEIGHTS]))


def _of_script(reference: str, digest: str) -> Claim:
    script = Path(reference.rpartition(":")[0])
    return Claim(str(script), digest, lambda: (script_digest(reference), [script]))
