"""llama2.c checkpoints (github.com/karpathy/llama2.c, the format of ``run.c``) as Hugging Face folders.

The file holds seven int32 and float32 tensors; a tokenizer lies beside it, pieces with scores.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeship.errors import SourceError, WeightsError

if TYPE_CHECKING:
    import torch

HEADER_BYTES = 28
# Byte b of a character that is not a piece is the token b + 3.
FIRST_BYTE = 3
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


def is_checkpoint(path: Path) -> bool:
    """Whether a file is as long as the sizes in its first seven numbers say."""
    with path.open("rb") as file:
        head = file.read(HEADER_BYTES)
    if len(head) < HEADER_BYTES:
        return False
    dim, hidden, layers, heads, kv_heads, vocabulary, length = struct.unpack("7i", head)
    if min(dim, hidden, layers, heads, kv_heads, abs(vocabulary), length) < 1 or dim % heads or heads % kv_heads:
        return False
    width = dim // heads
    table = abs(vocabulary) * dim
    each = 2 * dim + 2 * dim * heads * width + 2 * dim * kv_heads * width + 3 * dim * hidden
    numbers = table * (1 if vocabulary > 0 else 2) + layers * each + dim + length * (width // 2) * 2
    return bool(path.stat().st_size == HEADER_BYTES + 4 * numbers)


def tokenizer_of(path: Path, vocabulary: int) -> Path:
    """The tokenizer beside a checkpoint: ``tok<vocabulary>.bin`` or ``tokenizer.bin``. `SourceError` without one."""
    found = [path.with_name(f"tok{vocabulary}.bin"), path.with_name("tokenizer.bin")]
    for name in found:
        if name.is_file():
            return name
    raise SourceError(f"{path} has no tokenizer beside it", fix=f"put {found[0].name} or {found[1].name} there")


def write_folder(path: Path, folder: Path) -> None:
    """Write a checkpoint and its tokenizer as a Hugging Face folder.

    Raises:
        WeightsError: the checkpoint is damaged. SourceError: no tokenizer, or a damaged one.
    """
    from transformers import PreTrainedTokenizerFast

    model = read_checkpoint(path)
    pieces = read_pieces(tokenizer_of(path, model.config.vocab_size), model.config.vocab_size)
    model.save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_tokenizer(pieces), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)


def read_pieces(path: Path, count: int) -> list[tuple[bytes, float]]:
    """The pieces of a llama2.c tokenizer with their scores. `SourceError` when there are not ``count``."""
    data = path.read_bytes()
    place, found = 4, []
    try:
        while place < len(data):
            score, size = struct.unpack_from("fi", data, place)
            place += 8
            piece = data[place : place + size]
            if size < 0 or len(piece) < size:
                raise ValueError
            found.append((piece, score))
            place += size
    except (struct.error, ValueError):
        raise SourceError(f"{path} is cut short", fix="export it again") from None
    if len(found) != count:
        raise SourceError(f"{path} has {len(found)} pieces for a vocabulary of {count}", fix="give the model's own")
    return found


def _tokenizer(pieces: list[tuple[bytes, float]]) -> Any:
    """As the tokenizers library has it: scores become the order of merges."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    words = [_word(i, piece) for i, (piece, _) in enumerate(pieces)]
    ids = {word: i for i, word in enumerate(words)}
    merges = []
    order = sorted(range(len(words)), key=lambda i: -pieces[i][1])
    for i in order:
        word = words[i]
        if i >= FIRST_BYTE + 256:
            merges += [
                (word[:cut], word[cut:]) for cut in range(1, len(word)) if word[:cut] in ids and word[cut:] in ids
            ]
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in ("<unk>", "<s>", "</s>")])
    return tokenizer


def _word(index: int, piece: bytes) -> str:
    if index < FIRST_BYTE:
        return ("<unk>", "<s>", "</s>")[index]
    if index < FIRST_BYTE + 256:
        return f"<0x{index - FIRST_BYTE:02X}>"
    return piece.decode("utf-8").replace(" ", SPACE)


def read_checkpoint(path: Path) -> Any:
    """The model as transformers has it, in float32.

    The file holds seven int32 (dim, hidden, layers, heads, KV heads, vocabulary, length) and float32 tensors, each kind
    for all layers together. Query and key rows come in interleaved pairs for the rotation; transformers wants halves.
    """
    import numpy as np
    import torch

    from edgeship.compat.transformers_attention import small_decoder

    data = path.read_bytes()
    if not is_checkpoint(path):
        raise WeightsError(f"{path} is not a llama2.c checkpoint, or it is cut short", fix="export it again")
    dim, hidden, layers, heads, kv_heads, vocabulary, length = struct.unpack_from("7i", data)
    numbers = np.frombuffer(data, np.float32, offset=HEADER_BYTES)
    width = dim // heads
    sizes: dict[str, Any] = {
        "hidden_size": dim,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": abs(vocabulary),
        "max_position_embeddings": length,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": vocabulary > 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    place = 0

    def take(*shape: int) -> torch.Tensor:
        """The next numbers of the file, in this shape."""
        nonlocal place
        size = int(np.prod(shape))
        found = torch.from_numpy(numbers[place : place + size].copy()).reshape(shape)
        place += size
        return found

    def halves(weight: torch.Tensor, count: int) -> torch.Tensor:
        """Rotated pairs side by side to halves: rows of [count * width, dim] in transformers' order."""
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
    model = small_decoder(**sizes)
    model.load_state_dict(state, strict=True)
    return model.eval()
