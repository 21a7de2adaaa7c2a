"""A chat model through each engine's own app interface, beside transformers: ten prompts, and a conversation.

python benchmarks/conversations.py FOLDER --made DIR [--weights float16] [--engines genai,litert-lm] [--context 2048]

FOLDER is a Hugging Face folder; what it is lowered to is kept in DIR, as benchmarks/engine_memory.py keeps it. Greedy on
both sides, transformers in float32. Where a token differs, its margin is how much likelier the float32 model finds its own token, in standard deviations of its logits
there: rounding explains a small one. What follows is compared with transformers on what the engine wrote. Writes
docs/results/conversations.md.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine_memory import called, lowered
from results import write_page

from edgeship.core.registry import runtimes
from edgeship.errors import EdgeshipError
from edgeship.llm.dialogue import Answer
from edgeship.llm.session import LanguageSession

PROMPTS = [
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "What is 12 plus 30?",
    "Name three colours.",
    "Who wrote Hamlet?",
    "Translate 'good morning' into French.",
    "Is the sun a star? Answer briefly.",
    "Give me a word that rhymes with cat.",
    "How many days are in a week?",
    "Say hello in Japanese, with one emoji.",
]
TURNS = [
    "What is the capital of France?",
    "And of Italy?",
    "Which of the two is larger? Answer in one sentence.",
    "Thank you.",
    "What did I ask you first?",
]
LONG = 64
# Float16 weights and other orders of summation move a logit by less.
ROUNDING = 0.05


@dataclass
class Row:
    """What one engine did in one of the two tasks."""

    answers: int = 0
    equal: int = 0
    tokens: int = 0
    prompts: int = 0
    ended: int = 0
    worst: float = 0.0
    first: str = ""


class Original:
    """The model in transformers."""

    def __init__(self, folder: Path) -> None:
        import torch
        import transformers

        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        told = self.model.generation_config.eos_token_id
        self.eos = list(told) if isinstance(told, list) else [told]
        self._written: dict[tuple[tuple[int, ...], int], tuple[str, bool]] = {}

    def prompt(self, turns: list[dict[str, str]]) -> tuple[str, list[int]]:
        """What it is handed, as text and tokens."""
        text = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        return text, self.tokenizer(text, add_special_tokens=False).input_ids

    def write(self, prompt: list[int], limit: int) -> tuple[str, bool]:
        """Its own answer by `generate`, and whether it ended it."""
        import torch

        key = tuple(prompt), limit
        if key not in self._written:
            found = self.model.generate(torch.tensor([prompt]), max_new_tokens=limit, do_sample=False, pad_token_id=0)
            tokens = found[0, len(prompt) :].tolist()
            ended = bool(tokens) and tokens[-1] in self.eos
            self._written[key] = self.tokenizer.decode(tokens[:-1] if ended else tokens), ended
        return self._written[key]

    def margin(self, prompt: list[int], answer: Answer) -> tuple[float, str]:
        """The largest distance of any token of an answer from this model's first choice, and that place in words."""
        import torch

        written = answer.written
        tokens = self.tokenizer(answer.text, add_special_tokens=False).input_ids if written is None else list(written)
        with torch.no_grad():
            logits = self.model(torch.tensor([[*prompt, *tokens]])).logits[0]
        worst, where = 0.0, ""
        for place in range(len(tokens) + answer.ended):
            row = logits[len(prompt) - 1 + place]
            taken = [tokens[place]] if place < len(tokens) else self.eos
            best = max(taken, key=lambda token: float(row[token]))
            behind = float((row.max() - row[best]) / row.std())
            if behind > worst:
                worst, where = behind, f"token {place + 1}: {self.tokenizer.decode([best])!r}"
        return worst, where


def ask(original: Original, talk: Any, messages: list[str], limit: int, row: Row, *, conversation: bool) -> None:
    turns: list[dict[str, str]] = []
    for message in messages:
        turns.append({"role": "user", "content": message})
        text, prompt = original.prompt(turns)
        answer = talk.say(message, limit)
        wanted, ended = original.write(prompt, limit)
        same = (answer.text, answer.ended) == (wanted, ended)
        # A text that splits into other tokens than were written would be judged by those.
        worst, where = (0.0, "") if same else original.margin(prompt, answer)
        row.answers += 1
        row.prompts += text == answer.heard if talk.whole or len(turns) == 1 else text.endswith(answer.heard)
        row.equal += same
        row.tokens += answer.tokens
        row.ended += answer.ended
        if worst > row.worst:
            row.worst, row.first = worst, where
        turns.append({"role": "assistant", "content": answer.text})
        print(
            f"  {message!r} -> {answer.text!r}{'' if answer.text == wanted else f' instead of {wanted!r}'} {worst:.3f}"
        )
        # Of an answer that was cut an engine's cache has no end, and the next turn is another than transformers'.
        if conversation and not answer.ended:
            return


@contextlib.contextmanager
def quiet():
    """Without what engines' libraries write to the terminal."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def run(original: Original, args: argparse.Namespace, kind: str, plan: str) -> list[list[str]]:
    artifact, record = lowered(args.folder, args.made / called(args.folder), plan, args.context, kind)
    runtime = runtimes()[type(artifact).runtime]
    print(kind, plan, flush=True)
    rows = {"prompts": Row(), "conversation": Row()}
    interface = ""
    with quiet(), runtime.open_fast(artifact) as session:
        assert isinstance(session, LanguageSession)
        for number in range(len(PROMPTS) + 1):
            talk = session.dialogue(args.folder, record.decoder.eos)
            interface = talk.interface
            last = number == len(PROMPTS)
            try:
                ask(
                    original, talk, TURNS if last else [PROMPTS[number]], LONG if last else args.tokens,
                    rows["conversation" if last else "prompts"], conversation=last,
                )  # fmt: skip
            except EdgeshipError as error:
                print(error)
            finally:
                talk.close()
    lines = []
    for task, row in rows.items():
        far = f"{row.worst:.5f} ({row.first})" if row.worst else "-"
        figures = [row.answers, row.prompts, row.equal, row.tokens, row.ended]
        lines.append([interface, plan, task, *map(str, figures), far])
    return lines


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--made", type=Path, required=True)
    parser.add_argument("--weights", default="float16")
    parser.add_argument("--engines", default="genai,litert-lm")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=48)
    args = parser.parse_args()
    original = Original(args.folder)
    lines = []
    for plan in args.weights.split(","):
        for kind in args.engines.split(","):
            lines += run(original, args, kind, plan)
    columns = [
        "interface", "weights", "task", "answers", "prompts as transformers", "answers as transformers", "tokens",
        "ended by the model", "furthest token",
    ]  # fmt: skip
    before = (
        f"{called(args.folder)}, greedy, beside `generate` of transformers in float32: ten prompts of at most {args.tokens} "
        f"tokens, and a conversation of five turns of at most {LONG}. *Furthest token*: of all tokens written, the one that the "
        f"float32 model likes least compared with its own choice there, in standard deviations of its logits; below "
        f"{ROUNDING:g} rounding explains it."
    )
    write_page(
        "conversations", "Conversations through each engine's own interface", "python benchmarks/conversations.py",
        ["transformers", "onnxruntime-genai", "litert-lm-api"], columns, lines, before,
    )  # fmt: skip


if __name__ == "__main__":
    main()
