"""llama2.c's own tokenizer, merge by merge, as ``run.c`` does it."""

from __future__ import annotations

import struct
from pathlib import Path


class Tokenizer:
    """Byte pair encoding by scores: the best pair is merged first, unknown characters become bytes."""

    def __init__(self, path: Path) -> None:
        data = path.read_bytes()
        place = 4
        self.pieces: list[bytes] = []
        self.scores: list[float] = []
        while place < len(data):
            score, size = struct.unpack_from("fi", data, place)
            place += 8
            self.pieces.append(data[place : place + size])
            self.scores.append(score)
            place += size
        self.ids = {piece: index for index, piece in enumerate(self.pieces)}

    def encode(self, text: str) -> list[int]:
        """Ids with the start token and the leading space that the model was trained with."""
        ids = []
        for character in " " + text:
            raw = character.encode()
            ids += [self.ids[raw]] if raw in self.ids else [byte + 3 for byte in raw]
        while True:
            best, where = -1e10, -1
            for index in range(len(ids) - 1):
                merged = self.ids.get(self.pieces[ids[index]] + self.pieces[ids[index + 1]])
                if merged is not None and self.scores[merged] > best:
                    best, where = self.scores[merged], index
            if where < 0:
                return [1, *ids]
            merged = self.ids[self.pieces[ids[where]] + self.pieces[ids[where + 1]]]
            ids[where : where + 2] = [merged]
