"""A chat model through each engine's own app interface, beside transformers: ten prompts, and a conversation.

python benchmarks/conversations.py FOLDER BUNDLE [BUNDLE...] [--tokens 48] [--prompts 10] [--turns 5]

FOLDER is the Hugging Face folder that the bundles were built from. Greedy on both sides, transformers in float32. Where a
token differs, its margin is how much likelier the float32 model finds its own token, in standard deviations of its logits
there: rounding explains a small one. What follows is compared with transformers on what the engine wrote. Writes
docs/results/conversations.md.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from results import write_page

from edgeship.core.registry import runtimes
from edgeship.errors import EdgeshipError
from edgeship.llm.session import LanguageSession
from edgeship.shipping.bundle import opened, read_bundle

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
    seconds: float = 0.0


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

    def margin(self, prompt: list[int], said: str, ended: bool) -> tuple[float, str]:
        """The largest distance of any token of an answer from this model's first choice, and that place in words."""
        import torch

        tokens = self.tokenizer(said, add_special_tokens=False).input_ids
        with torch.no_grad():
            logits = self.model(torch.tensor([[*prompt, *tokens]])).logits[0]
        worst, where = 0.0, ""
        for place in range(len(tokens) + ended):
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
        start = time.perf_counter()
        answer = talk.say(message, limit)
        row.seconds += time.perf_counter() - start
        wanted, ended = original.write(prompt, limit)
        worst, where = original.margin(prompt, answer.text, answer.ended)
        row.answers += 1
        row.prompts += text == answer.heard if talk.whole or len(turns) == 1 else text.endswith(answer.heard)
        row.equal += (answer.text, answer.ended) == (wanted, ended)
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


def run(original: Original, bundle_path: Path, args: argparse.Namespace) -> list[list[str]]:
    lines = []
    bundle = read_bundle(bundle_path)
    for record in bundle.manifest.artifacts:
        runtime = runtimes()[record.runtime]
        print(record.runtime, bundle_path, flush=True)
        limit = args.tokens if runtime.execution == "native" else args.slow_tokens
        rows = {"prompts": Row(), "conversation": Row()}
        interface = ""
        with quiet(), runtime.open_fast(opened(bundle, record)) as session:
            assert isinstance(session, LanguageSession)
            eos = [int(token) for token in record.facts["eos"].split(",")]
            for number in range(args.prompts + 1):
                talk = session.dialogue(bundle_path / "tokenizer", eos)
                interface = talk.interface
                last = number == args.prompts
                messages = TURNS[: args.turns] if last else [PROMPTS[number]]
                try:
                    ask(
                        original,
                        talk,
                        messages,
                        limit if not last else max(limit, 64),
                        rows["conversation" if last else "prompts"],
                        conversation=last,
                    )
                except EdgeshipError as error:
                    print(error)
                finally:
                    talk.close()
        for task, row in rows.items():
            far = f"{row.worst:.3f} ({row.first})" if row.worst > ROUNDING else f"{row.worst:.3f}"
            lines.append([
                runtime.title, interface, f"{bundle.manifest.profile}", task, str(row.answers), f"{row.prompts}",
                f"{row.equal}", str(row.tokens), str(row.ended), far, f"{row.seconds:.1f} s",
            ])  # fmt: skip
    return lines


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--slow-tokens", type=int, default=12)
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--turns", type=int, default=len(TURNS))
    args = parser.parse_args()
    original = Original(args.folder)
    lines = [line for bundle in args.bundles for line in run(original, bundle, args)]
    columns = [
        "engine",
        "interface",
        "profile",
        "task",
        "answers",
        "prompts as transformers",
        "texts as transformers",
        "tokens",
        "ended by the model",
        "furthest token",
        "time",
    ]
    before = (
        f"{args.folder.name and 'SmolLM2-135M-Instruct'} in the profile named, greedy, beside `generate` of transformers in float32: ten prompts of at most {args.tokens} tokens "
        f"({args.slow_tokens} where only an emulator runs), and a conversation of five turns, which ends early when an answer is cut. *Furthest token*: "
        f"of all tokens written, the one that the float32 model likes least compared with its own choice, in standard deviations of its logits; "
        f"below {ROUNDING:g} rounding explains it."
    )
    write_page(
        "conversations",
        "Conversations through each engine's own interface",
        "python " + " ".join(Path(a).name if "/" in a else a for a in sys.argv),
        ["transformers", "onnxruntime-genai", "litert-lm-api", "coreai-core"],
        columns,
        lines,
        before,
    )


if __name__ == "__main__":
    main()
