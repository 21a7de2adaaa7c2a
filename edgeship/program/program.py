"""`TorchProgram`: a normalised exported graph, its weights on disk, and the encodings decided for them."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from edgeship.core.decoder import Decoder
from edgeship.core.forms import Forms
from edgeship.core.inventory import Inventory
from edgeship.core.model import Signature, TorchModel
from edgeship.core.records import read_json, to_plain, write_json
from edgeship.core.weights import ActivationEncoding, EncodedTensor, Encoding
from edgeship.errors import ArtifactError, LoweringError, SourceError, WeightsError
from edgeship.program.counted import Counted
from edgeship.program.expected import Expected
from edgeship.program.stored import ENCODED, EncodedStore, link, open_floats, save_encoded, save_floats

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram


ORIGIN = "origin"
# Entries of a program's history that a report shows.
REMARK = "note: "
GRAPH = "program.pt2"


@dataclass(frozen=True)
class ProgramRecord:
    """The part of a program that is plain data: ``program.json``.

    Args:
        encodings: weight name -> encoding, for every weight that compression decided.
        activations: name of a graph node -> its static integers.
        aliases: weight name -> name of the weight it is tied to (stored once).
        assignment: weight name -> the encoding that an allocation chose for it, before anything is encoded.
        curve: what the allocation chose from: (bytes, loss) of the best choice at each budget, smallest first.
        pruned: weight name -> share of its numbers that pruning made zero.
        losses: weight name -> noise over signal in the worst slice of an output with it alone rounded as the profile
            has it, where that was measured.
        decoder: of a language model: its layers, caches and tokens.
        expected: weight of a first layer -> what its answers were like in training.
        counted: output -> the output that says how many of its rows count, where values choose them.
        history: one sentence for each pass that made this program.
    """

    signature: Signature
    inventory: Inventory
    encodings: dict[str, Encoding] = field(default_factory=dict)
    activations: dict[str, ActivationEncoding] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    history: tuple[str, ...] = ()
    assignment: dict[str, Encoding] = field(default_factory=dict)
    curve: tuple[tuple[int, float], ...] = ()
    pruned: dict[str, float] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    decoder: Decoder | None = None
    expected: dict[str, Expected] = field(default_factory=dict)
    counted: dict[str, Counted] = field(default_factory=dict)


def read_record(model: TorchModel) -> ProgramRecord:
    """The plain-data part of a saved program, without importing torch."""
    return read_json(ProgramRecord, model.path / "program.json")


class StoredGraph:
    """A saved graph, read when it is first asked for: reading takes seconds, and many passes look at weights alone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read: ExportedProgram | None = None

    def read(self) -> ExportedProgram:
        """The graph. Raises `ArtifactError` when it is damaged."""
        from edgeship.program.archive import read_archive

        if self._read is None:
            try:
                self._read = read_archive(self.path, own=True)
            except (SourceError, OSError) as error:
                reason = " ".join(str(error).split())[:200]
                raise ArtifactError(f"{self.path} is not a torch program: {reason}", fix="build again") from error
        return self._read


class _InForms(Mapping[str, EncodedTensor]):
    """Encoded weights, each translated when it is asked for."""

    def __init__(self, encoded: Mapping[str, EncodedTensor], forms: Forms) -> None:
        self._encoded, self._forms = encoded, forms

    def __getitem__(self, name: str) -> EncodedTensor:
        return self._forms.translated(self._encoded[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._encoded)

    def __len__(self) -> int:
        return len(self._encoded)


@dataclass
class TorchProgram:
    """A torch program as compression and the converters see it.

    Args:
        held: the normalised graph, or where it lies; `exported` is the graph either way.
        weights: float weights by name (tied names left out), read lazily.
        encoded: the weights that compression decided, as they will be stored.
        record: signature, inventory, activation encodings, aliases, history.
        origin: folder with the files of `Decoder.files`, for a language model.
    """

    held: ExportedProgram | StoredGraph
    weights: Mapping[str, torch.Tensor]
    encoded: Mapping[str, EncodedTensor]
    record: ProgramRecord
    origin: Path | None = None

    @property
    def exported(self) -> ExportedProgram:
        """The normalised ``ExportedProgram``, read when first asked for; not to be changed in place. Its
        ``state_dict`` may hold stride-0 placeholders, so take weights from `weight`, or a filled copy from `filled`."""
        return self.held.read() if isinstance(self.held, StoredGraph) else self.held

    @property
    def signature(self) -> Signature:
        """Inputs and outputs by name."""
        return self.record.signature

    @property
    def activations(self) -> dict[str, ActivationEncoding]:
        """Static activation encodings by graph node name; empty when activations stay float."""
        return self.record.activations

    def in_forms(self, forms: Forms) -> TorchProgram:
        """The program with its weights in the encodings that the files of a format say (`Forms.translated`)."""
        encodings = {name: forms.in_the_file(encoding) for name, encoding in self.record.encodings.items()}
        if encodings == self.record.encodings:
            return self
        record = replace(self.record, encodings=encodings)
        return replace(self, encoded=_InForms(self.encoded, forms), record=record)

    def weight(self, name: str) -> torch.Tensor:
        """One weight as the reference computes with it: dequantized when encoded; integer buffers as they are.

        The shape is the inventory's.
        """
        import torch

        name = self.record.aliases.get(name, name)
        if name in self.encoded:
            return torch.from_numpy(self.encoded[name].dequantize().copy())
        return self.weights[name]

    def filled(self) -> ExportedProgram:
        """The exported program with every weight at its dequantized value, in float32. Shares no state with ours."""
        import torch

        from edgeship.compat.torch import replaced

        state: dict[str, torch.Tensor] = {}
        for name, old in self.exported.state_dict.items():
            tied = self.record.aliases.get(name, name)
            if tied != name and tied in state:
                state[name] = state[tied]
                continue
            value = self.weight(name)
            value = value.float() if value.is_floating_point() else value
            state[name] = (
                torch.nn.Parameter(value, requires_grad=False) if isinstance(old, torch.nn.Parameter) else value
            )
        return replaced(self.exported, state_dict=state)

    def quantized(self) -> ExportedProgram:
        """`filled`, with ``quantized_decomposed`` quantize/dequantize pairs after each node in `activations`."""
        from edgeship.program.activations import insert_pairs

        return insert_pairs(self.filled(), self.activations)

    def module(self, *, quantized: bool = True) -> torch.nn.Module:
        """The reference as a callable: dequantized weights and, when decided, quantized activations."""
        program = self.quantized() if quantized and self.activations else self.filled()
        return cast("torch.nn.Module", program.module())

    def example_inputs(self) -> tuple[Any, ...]:
        """Positional example inputs that the graph was exported with."""
        args, kwargs = self.exported.example_inputs or ((), {})
        return (*args, *kwargs.values())

    def language(self) -> tuple[Decoder, Path]:
        """The language model that this program scores texts of, and the folder with its files.

        Raises `LoweringError` when it is none.
        """
        if self.record.decoder is None or self.origin is None:
            raise LoweringError("this program is not a language model", fix="give a folder with one")
        return self.record.decoder, self.origin

    def content_digest(self) -> str:
        """SHA-256 in hex over the graph, the record and every float weight: equal programs have equal ones."""
        import torch

        digest = hashlib.sha256()
        graph = io.BytesIO()
        torch.export.save(self._hollow(), graph)
        digest.update(graph.getvalue() + json.dumps(to_plain(self.record), sort_keys=True).encode())
        for name, value in sorted(self.weights.items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            # [...] -> [bytes]
            digest.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _hollow(self) -> ExportedProgram:
        """The graph with placeholders for its weights."""
        from edgeship.compat.torch import replaced

        held = self.exported
        return replaced(held, state_dict={name: _placeholder(value) for name, value in held.state_dict.items()})

    def save(self, folder: Path) -> None:
        """Write program.pt2 (graph, placeholder weights), float weights that changed, where the others lie
        (weights.json), encoded.safetensors and program.json."""
        import torch

        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(self.held, StoredGraph):
            link(self.held.path, folder / GRAPH)
        else:
            torch.export.save(self._hollow(), folder / GRAPH)
        save_floats(self.weights, folder)
        save_encoded(self.encoded, folder / ENCODED)
        if self.origin is not None and self.record.decoder is not None:
            (folder / ORIGIN).mkdir()
            for name in self.record.decoder.files:
                shutil.copyfile(self.origin / name, folder / ORIGIN / name)
        write_json(folder / "program.json", self.record)

    @classmethod
    def open(cls, model: TorchModel) -> TorchProgram:
        """Load a saved program. Weights stay on disk until asked for."""
        folder = model.path
        record = read_record(model)
        if not zipfile.is_zipfile(folder / GRAPH):
            raise ArtifactError(f"{folder} does not hold a torch program: {GRAPH} is damaged", fix="build again")
        try:
            encoded = EncodedStore(folder / ENCODED, record.encodings)
            weights = open_floats(folder)
        except WeightsError as error:
            raise ArtifactError(f"{folder} does not hold a torch program: {error.what}", fix="build again") from error
        origin = folder / ORIGIN
        return cls(StoredGraph(folder / GRAPH), weights, encoded, record, origin if origin.is_dir() else None)


def _placeholder(value: torch.Tensor) -> torch.Tensor:
    """A tensor of the same shape without numbers of its own; scalars and integers as they are."""
    import torch

    if value.dim() == 0 or not value.is_floating_point():
        return value
    hollow = torch.zeros((), dtype=value.dtype).expand(value.shape)
    if not value.numel():
        # A view of another storage that holds no numbers confuses the archive's writer.
        hollow = torch.empty(value.shape, dtype=value.dtype)
    return torch.nn.Parameter(hollow, requires_grad=False) if isinstance(value, torch.nn.Parameter) else hollow
