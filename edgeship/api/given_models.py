"""Models that lie in memory: an ``nn.Module``, an ``ExportedProgram``, or a model object of transformers.

A module or an exported program is brought into normal form here and handed to load/memory; the cache knows it by the
digest of its graph and weights. A model of transformers is written as the folder that it would be saved as, into the
cache, and goes the way of folders. No code is written anywhere.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgeship.core.model import Signature, Source
from edgeship.engine.cache import Cache
from edgeship.engine.sources import Found, find_source
from edgeship.errors import UsageError


@dataclass(frozen=True, eq=False)
class GivenModel:
    """A model in memory and what was said of its inputs.

    Args:
        title: the name of its class, which the bundle gets when no other is given.
        folder: whether it goes the way of a Hugging Face folder.
    """

    title: str
    model: Any
    inputs: Any
    tokenizer: Any
    folder: bool


def is_in_memory(model: Any) -> bool:
    """Whether this is a model itself and not the name of one. torch is asked only where it was imported."""
    torch = sys.modules.get("torch")
    if torch is None or isinstance(model, (str, os.PathLike)):
        return False
    return isinstance(model, (torch.nn.Module, torch.export.ExportedProgram))


def take_model(model: Any, inputs: Any, tokenizer: Any) -> GivenModel:
    """A model in memory with its inputs. Raises `UsageError` where inputs are needed, or a tokenizer is not."""
    title = type(model).__name__
    folder = _is_of_transformers(model)
    if tokenizer is not None and not folder:
        raise UsageError(
            f"tokenizer belongs to a language model of transformers; this is a {title}", fix="leave it out"
        )
    exported = hasattr(model, "graph_signature")
    if inputs is None and not folder and not exported:
        raise UsageError(
            f"{title} does not say what its inputs are",
            fix='give inputs=example, or inputs="image:f32[1,3,224,224]"',
        )
    if inputs is not None and exported:
        raise UsageError("--input is for models whose sizes are open", fix="leave it out; this source says its own")
    return GivenModel(title, model, inputs, tokenizer, folder)


def _is_of_transformers(model: Any) -> bool:
    """Whether transformers itself has the class of a model, and so can load it from the folder it is saved as."""
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return False
    return getattr(transformers, type(model).__name__, None) is type(model)


def find_model(
    given: GivenModel,
    outputs: tuple[str, ...],
    renames: tuple[str, ...],
    cache: Cache,
    *,
    cut: tuple[str, ...] = (),
    candidates: int | None = None,
) -> Found:
    """A model in memory as a source: exported, or written as a folder into the cache.

    Args:
        cut, candidates: see `edgeship.program.export.make_program`.

    Raises:
        SourceError: it cannot be exported, or written. UsageError: inputs that it does not take.
    """
    if given.folder:
        found = _folder_source(given, outputs, renames, cache)
        return replace(found, load={**found.load, "cut": cut})
    from edgeship.data.specs import parse_renames
    from edgeship.engine.sources import check_names
    from edgeship.frontends.exported import program_of_exported
    from edgeship.frontends.module import program_of_module
    from edgeship.program.suppression import CANDIDATES, check_candidates

    notes = {old: {"name": new} for old, new in parse_renames(renames).items()}
    check_names(outputs)
    what = f"load/memory: {given.title}"
    boxes = check_candidates(CANDIDATES if candidates is None else candidates)
    if hasattr(given.model, "graph_signature"):
        program = program_of_exported(given.model, given.title, outputs, notes, note=what, cut=cut, candidates=boxes)
    else:
        program = program_of_module(given.model, given.inputs, outputs, notes, note=what, cut=cut, candidates=boxes)
    source = Source(
        Path(given.title),
        Signature((), ()),
        program.content_digest(),
        form="memory",
        reference=given.title,
        held=program,
    )
    load = {"inputs": (), "outputs": outputs, "factory": None, "notes": notes, "trusted": False, "cut": cut}
    return Found(source, load)


def _folder_source(given: GivenModel, outputs: tuple[str, ...], renames: tuple[str, ...], cache: Cache) -> Found:
    from edgeship.data.specs import spec_texts
    from edgeship.frontends.module import write_pretrained

    folder = cache.kept(lambda place: write_pretrained(given.model, given.tokenizer, place))
    found = find_source(str(folder), inputs=spec_texts(given.inputs), outputs=outputs, renames=renames)
    if given.tokenizer is None and found.source.form == "decoder":
        raise UsageError(
            f"{given.title} is a language model, and its tokenizer is not given",
            fix="add tokenizer=..., or give inputs to build the network without a cache",
        )
    return replace(found, source=replace(found.source, reference=given.title))
