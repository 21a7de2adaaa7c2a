"""Read a llama2.c checkpoint and its tokenizer (github.com/karpathy/llama2.c, the format of ``run.c``)."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import torch
from torch import nn


def read_checkpoint(path: Path) -> nn.Module:
    """The model as transformers' Llama.

    The file holds seven int32 (dim, hidden, layers, heads, KV heads, vocabulary, length) and float32 tensors, each kind
    for all layers together. Query and key rows come in interleaved pairs for the rotation; transformers wants halves.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    data = path.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocabulary, length = struct.unpack_from("7i", data)
    numbers = np.frombuffer(data, np.float32, offset=28)
    width = dim // heads
    config = LlamaConfig(
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=abs(vocabulary),
        max_position_embeddings=length,
        rms_norm_eps=1e-5,
        tie_word_embeddings=vocabulary > 0,
        bos_token_id=1,
        eos_token_id=2,
    )
    place = 0

    def take(*shape: int) -> torch.Tensor:
        nonlocal place
        size = int(np.prod(shape))
        found = torch.from_numpy(numbers[place : place + size].copy()).reshape(shape)
        place += size
        return found

    def halves(weight: torch.Tensor, count: int) -> torch.Tensor:
        return weight.reshape(count, width // 2, 2, dim).transpose(1, 2).reshape(count * width, dim)

    inner = heads * width
    kv = kv_heads * width
    state = {"model.embed_tokens.weight": take(abs(vocabulary), dim)}
    norms = take(layers, dim)
    q, k, v, o = take(layers, inner, dim), take(layers, kv, dim), take(layers, kv, dim), take(layers, dim, inner)
    later = take(layers, dim)
    gate, down, up = take(layers, hidden, dim), take(layers, dim, hidden), take(layers, hidden, dim)
    state["model.norm.weight"] = take(dim)
    # The rotation's cosines and sines: transformers makes them itself.
    take(length, width // 2)
    take(length, width // 2)
    state["lm_head.weight"] = state["model.embed_tokens.weight"] if vocabulary > 0 else take(-vocabulary, dim)
    for i in range(layers):
        head = f"model.layers.{i}."
        state |= {
            f"{head}input_layernorm.weight": norms[i],
            f"{head}post_attention_layernorm.weight": later[i],
            f"{head}self_attn.q_proj.weight": halves(q[i], heads),
            f"{head}self_attn.k_proj.weight": halves(k[i], kv_heads),
            f"{head}self_attn.v_proj.weight": v[i],
            f"{head}self_attn.o_proj.weight": o[i],
            f"{head}mlp.gate_proj.weight": gate[i],
            f"{head}mlp.down_proj.weight": down[i],
            f"{head}mlp.up_proj.weight": up[i],
        }
    model = LlamaForCausalLM(config)
    model.load_state_dict(state, strict=True)
    return model.eval()


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
