"""PEFT's LoRA adapters (Hu et al. 2021, arXiv:2106.09685), merged into the weights of their base."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeship.core.artifact import source_digest
from edgeship.errors import SourceError, WeightsError
from edgeship.program.stored import TensorFile

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

CONFIGURATION, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# What changes more than a product of two matrices would.
REFUSED = {
    "use_dora": "DoRA",
    "lora_bias": "biases in its products",
    "alora_invocation_tokens": "tokens that switch it on",
    "modules_to_save": "whole modules trained beside it",
    "rank_pattern": "ranks by layer",
    "alpha_pattern": "scales by layer",
    "megatron_config": "Megatron layers",
}


def adapter_digest(folder: Path) -> str:
    """Digest over an adapter's two files. `SourceError` when it has not both."""
    digest = hashlib.sha256()
    for name in (CONFIGURATION, WEIGHTS):
        if not (folder / name).is_file():
            raise SourceError(f"{folder} has no {name}", fix="give the folder that PEFT's save_pretrained wrote")
        digest.update(source_digest(folder / name).encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class Adapter:
    """Differences ``scale * B @ A`` by the name of the weight that they change.

    Args:
        pairs: weight name -> names of A ``[r, in]`` and B ``[out, r]`` in ``file``.
    """

    file: TensorFile
    pairs: Mapping[str, tuple[str, str]]
    scale: float

    def difference(self, name: str) -> torch.Tensor:
        """What is added to one weight, ``[out, in]``, float32."""
        down, up = self._factors(name)
        return self.scale * (up @ down)

    def matrices(self, name: str) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """The factors for a layer's input, ``[in, r]`` and ``[r, out]`` with the scale in it, float32."""
        down, up = self._factors(name)
        return down.T.contiguous().numpy(), (self.scale * up).T.contiguous().numpy()

    def _factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """``down`` [rank, in] and ``up`` [out, rank], in float32."""
        import torch

        down, up = (torch.from_numpy(self.file.read(key)).float() for key in self.pairs[name])
        return down, up


def read_adapter(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> Adapter:
    """An adapter for a model with weights of these shapes.

    Raises:
        SourceError: not a LoRA adapter, or one with parts that cannot be merged so.
        WeightsError: damaged, or made for another base.
    """
    import numpy as np

    adapter_digest(folder)
    try:
        config = json.loads((folder / CONFIGURATION).read_text(encoding="utf-8"))
        kind, rank, alpha = str(config["peft_type"]), int(config["r"]), float(config["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"{folder / CONFIGURATION} cannot be read: {error!r}", fix="save the adapter again") from None
    if kind != "LORA":
        raise SourceError(f"{folder} is an adapter of kind {kind}", fix="edgeship merges LoRA")
    for key, words in REFUSED.items():
        if config.get(key):
            raise SourceError(f"{folder} has {words}, which edgeship does not merge", fix="merge it with PEFT first")
    if config.get("bias", "none") != "none":
        raise SourceError(f"{folder} has trained biases, which edgeship does not merge", fix="merge it with PEFT first")
    if rank < 1 or not math.isfinite(alpha):
        raise SourceError(f"{folder} has rank {rank} and alpha {alpha:g}", fix="save the adapter again")
    file = TensorFile(folder / WEIGHTS)
    pairs = {}
    for key in file:
        name, part, _ = key.removeprefix(PREFIX).rpartition(".lora_A")
        if not part:
            # Its other matrix is taken with the first, below.
            if not key.endswith(".lora_B.weight") or key.replace(".lora_B", ".lora_A") not in file:
                raise SourceError(f"{folder} holds {key}, which is not part of LoRA", fix="merge it with PEFT first")
            continue
        other = key.replace(".lora_A", ".lora_B")
        weight = f"{name}.weight"
        if weight not in shapes or other not in file:
            raise WeightsError(
                f"{folder} changes {name}, which the model has not: it belongs to another base",
                fix=f"it was trained on {config.get('base_model_name_or_path') or 'a model that it does not name'}",
            )
        made = (file.shape(other)[0], file.shape(key)[1])
        if made != tuple(shapes[weight]) or file.shape(key)[0] != file.shape(other)[1]:
            raise WeightsError(
                f"{folder} changes {name} of {made[0]}x{made[1]}, the model has {'x'.join(map(str, shapes[weight]))}: "
                "it belongs to another base",
                fix=f"it was trained on {config.get('base_model_name_or_path') or 'a model that it does not name'}",
            )
        if file.shape(key)[0] != rank:
            raise WeightsError(
                f"{folder} says rank {rank}, and {name} has rank {file.shape(key)[0]}", fix="save the adapter again"
            )
        if not all(np.isfinite(file.read(part)).all() for part in (key, other)):
            raise WeightsError(f"{folder} changes {name} by NaN or infinity", fix="train the adapter again")
        pairs[weight] = (key, other)
    if not pairs:
        raise WeightsError(f"{folder} changes no weight", fix="save the adapter again")
    return Adapter(file, pairs, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


class Merged(Mapping[str, Any]):
    """The weights that an adapter changes, each computed when it is asked for."""

    def __init__(self, base: Mapping[str, torch.Tensor], adapter: Adapter, names: Mapping[str, str]) -> None:
        """``base``: names to tensors, [out, in] where the adapter changes them."""
        self._base, self._adapter, self._names = base, adapter, dict(names)

    def __getitem__(self, name: str) -> torch.Tensor:
        """``W + scale * up @ down``, [out, in] in float32."""
        return self._base[name].float() + self._adapter.difference(self._names[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
