"""Train the storyteller: a byte-level BPE tokenizer and a Llama of 2.2 million weights, from one text file.

python samples/storyteller/train.py tinyshakespeare.txt

Writes model/, a Hugging Face folder, and eval.json. About 20 minutes of one CPU core.
Needs the huggingface extra: pip install "edgeship[huggingface]".
"""

import json
import math
import platform
import sys
import time
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import dropout
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

FOLDER = Path(__file__).parent
SEED = 20261122
BOUNDARY = "<|endoftext|>"
VOCABULARY, WIDTH, INNER, LAYERS, HEADS, KV_HEADS = 1024, 192, 512, 5, 6, 2
HELD_OUT = 0.05
STEPS, WARMUP, EVERY = 1600, 100, 100
TOKENS_PER_STEP = 2048
# Three steps of four see short windows, which are cheaper; the fourth teaches the positions up to the model's limit.
SHORT, LONG = 256, 512
LEARNING_RATE = 2.5e-3
# A megabyte is read seven times over: without these a model of this size learns it by heart.
DROPOUT, WEIGHT_DECAY, MERGE_DROPOUT = 0.2, 0.6, 0.1
State = dict[str, torch.Tensor]


def main(source: Path) -> None:
    """Train both, keep the weights that read the held-out text best, and measure what was saved."""
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    text = source.read_text(encoding="utf-8")
    cut = text.rindex("\n\n", 0, int(len(text) * (1 - HELD_OUT))) + 2
    tokenizer = train_tokenizer(text[:cut])
    unseen = torch.tensor(tokenizer.encode(text[cut:], add_special_tokens=False))
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS, head_dim=32,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=LONG, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    network = LlamaForCausalLM(config)
    began = time.monotonic()
    network.load_state_dict(fit(network, tokenizer, text[:cut], unseen))
    minutes = (time.monotonic() - began) / 60
    network.half().save_pretrained(FOLDER / "model")
    tokenizer.save_pretrained(FOLDER / "model")

    saved = LlamaForCausalLM.from_pretrained(FOLDER / "model", dtype=torch.float32).eval()
    loss = held_out_loss(saved, unseen)
    size = len(text[cut:].encode("utf-8"))
    report = {
        "held_out": {"bytes": size, "tokens": len(unseen), "window": LONG},
        "perplexity_per_token": round(math.exp(loss), 3),
        "bits_per_byte": round(loss / math.log(2) * len(unseen) / size, 4),
        "training": {"steps": STEPS, "tokens": STEPS * TOKENS_PER_STEP, "minutes": round(minutes, 1)},
        "machine": f"{platform.system()} {platform.machine()}, 1 thread",
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, tokenizers)},
    }
    (FOLDER / "eval.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE that can spell any input; every text it encodes begins with the boundary token, number 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        [text], trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[BOUNDARY], initial_alphabet=alphabet)
    )
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOUNDARY} $A", special_tokens=[(BOUNDARY, 0)])
    names = {"bos_token": BOUNDARY, "eos_token": BOUNDARY}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=LONG, **names)


def fit(network: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str, unseen: torch.Tensor) -> State:
    """AdamW with warm-up and a cosine, on windows that begin with a line; the state with the least held-out loss."""
    # Llama has no dropout of its own but in attention; hooks add it, and the saved model knows nothing of them.
    for layer in network.model.layers:
        for part in (layer.self_attn.o_proj, layer.mlp.down_proj):
            part.register_forward_hook(lambda module, _, out: dropout(out, DROPOUT, module.training))
    groups = [
        {"params": [p for p in network.parameters() if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in network.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.97))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP, 0.02 + 0.98 * (1 + math.cos(math.pi * step / STEPS)) / 2)
    )
    least, best = math.inf, {}
    for step in range(1, STEPS + 1):
        if step % (2 * EVERY) == 1:
            left_out = MERGE_DROPOUT if step < 0.75 * STEPS else None
            tokens, starts = tokens_of(tokenizer.backend_tokenizer, text, left_out)
        width = LONG if step % 4 == 0 else SHORT
        usable = starts[starts + width <= len(tokens)]
        rows = usable[torch.randint(len(usable), (TOKENS_PER_STEP // width, 1))] + torch.arange(width - 1)
        windows = torch.nn.functional.pad(tokens[rows], (1, 0), value=tokenizer.bos_token_id)
        with torch.autocast("cpu", torch.bfloat16):
            loss = network.train()(input_ids=windows, labels=windows, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % EVERY == 0:
            now = held_out_loss(network.eval(), unseen)
            print(f"step {step}: training loss {loss.item():.3f}, held out {now:.3f}", flush=True)
            if now < least:
                least, best = now, {name: value.clone() for name, value in network.state_dict().items()}
    return best


def tokens_of(tokenizer: Tokenizer, text: str, merge_dropout: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, and where lines begin. With dropout other merges are left out each time (Provilkov et al., 2020)."""
    tokenizer.model.dropout = merge_dropout
    encoded = tokenizer.encode(text, add_special_tokens=False)
    tokenizer.model.dropout = None
    starts = [at for at, (first, _) in enumerate(encoded.offsets) if text[first - 1 : first] == "\n"]
    return torch.tensor(encoded.ids), torch.tensor(starts)


@torch.no_grad()
def held_out_loss(network: LlamaForCausalLM, tokens: torch.Tensor) -> float:
    """Mean nats a token; each is predicted once, in windows of ``LONG`` that begin with the boundary token."""
    total = 0.0
    for piece in tokens.split(LONG - 1):
        window = torch.nn.functional.pad(piece[None], (1, 0), value=network.config.bos_token_id)
        total += float(network(input_ids=window, labels=window, use_cache=False).loss) * len(piece)
    return total / len(tokens)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
