"""Activations of many batches, held between two layers: in memory up to a limit, beyond it in a file without a name."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, overload

if TYPE_CHECKING:
    import torch
    from torch.fx import Node

# Of a model with 2048 channels and 8192 inner ones, walked beside its float original, this is 3200 tokens.
HELD_BYTES = 256 << 20


class Shelf:
    """What some operators answered, batch by batch.

    Values are put once and read any number of times. Those that do not fit into memory go to a temporary file of their
    operator, which has no name any more and so never stays behind; it is read by seek and read, because mapped pages
    count as this process's memory.

    Args:
        count: batches. limit: bytes held in memory. folder: where files go; the system's temporary folder when None.
    """

    def __init__(self, count: int, limit: int = HELD_BYTES, folder: Path | None = None) -> None:
        self.count = count
        self.limit = limit
        self.held_bytes = 0
        self._folder = folder
        self._places: dict[Node, list[Any]] = {}
        self._files: dict[Node, IO[bytes]] = {}

    def __contains__(self, node: Node) -> bool:
        return node in self._places

    def __iter__(self) -> Iterator[Node]:
        return iter(list(self._places))

    def put(self, node: Node, index: int, value: Any) -> None:
        """Keep what an operator answered in one batch."""
        import torch

        places = self._places.setdefault(node, [None] * self.count)
        if not isinstance(value, torch.Tensor):
            places[index] = value
            return
        size = value.numel() * value.element_size()
        if self.held_bytes + size <= self.limit:
            # A part of a larger tensor would keep the whole alive.
            whole = value.untyped_storage().nbytes() <= size
            places[index] = value if whole else value.clone()
            self.held_bytes += size
            return
        file = self._files.get(node)
        if file is None:
            file = self._files[node] = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115  closed by drop
        start = file.seek(0, 2)
        rest = value.contiguous().reshape(-1).view(torch.uint8).numpy().data
        while rest:
            rest = rest[file.write(rest) :]
        places[index] = _Place(start, tuple(value.shape), value.dtype)

    def get(self, node: Node, index: int) -> Any:
        """What an operator answered in one batch."""
        value = self._places[node][index]
        return self._read(node, value) if isinstance(value, _Place) else value

    def release(self, node: Node, index: int) -> None:
        """Forget one batch."""
        import torch

        value = self._places[node][index]
        if isinstance(value, torch.Tensor):
            self.held_bytes -= value.numel() * value.element_size()
        self._places[node][index] = None

    def drop(self, node: Node) -> None:
        """Forget all that an operator answered."""
        for index in range(self.count):
            self.release(node, index)
        del self._places[node]
        file = self._files.pop(node, None)
        if file is not None:
            file.close()

    def close(self) -> None:
        """Forget everything."""
        for node in self:
            self.drop(node)

    def _read(self, node: Node, place: _Place) -> torch.Tensor:
        """The tensor of one batch, in the shape that it had."""
        import torch

        value = torch.empty(place.shape, dtype=place.dtype)
        into = value.reshape(-1).view(torch.uint8).numpy().data
        file = self._files[node]
        file.seek(place.start)
        done = 0
        while done < len(into):
            step = file.readinto(into[done:])  # type: ignore[attr-defined]
            if not step:
                raise OSError(f"the temporary file of {node.name} ends early")
            done += step
        return value


class Batches(Sequence["torch.Tensor"]):
    """A tensor a batch, made or read each time it is asked for."""

    def __init__(self, count: int, read: Callable[[int], torch.Tensor]) -> None:
        """``read`` gives the tensor of one batch, of any shape."""
        self._count = count
        self._read = read

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> torch.Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[torch.Tensor]: ...
    def __getitem__(self, index: int | slice) -> torch.Tensor | list[torch.Tensor]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = index + len(self) if index < 0 else index
        if not 0 <= number < len(self):
            raise IndexError(index)
        return self._read(number)


class _Place:
    """Where a value lies in its operator's file."""

    __slots__ = ("dtype", "shape", "start")

    def __init__(self, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.start = start
        self.shape = shape
        self.dtype = dtype
