"""A program that talks as ``edgeship chat`` does, with a model that writes a given text byte by byte.

python scripted.py TEXT [CONTEXT [SECONDS]]
"""

import sys
import time

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from edgeship.cli import interrupt
from edgeship.cli.talking import converse
from edgeship.conversation import Conversation
from edgeship.llm.generation import Stepper

END = 256


def byte_tokenizer():
    """A token a byte, and one that ends a text."""
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE({**letters, "<end>": END}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    wrapped.chat_template = (
        "{% for m in messages %}{{ m.role[0] + ':' + m.content + '<end>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
    )
    return wrapped


class Scripted(Stepper):
    """Writes one text again and again, whatever is said to it; a pause before each token."""

    chunk = 4

    def __init__(self, tokens, context, seconds):
        self.tokens, self.context, self.seconds = tokens, context, seconds
        self.seen = []
        self.reset()

    def reset(self):
        self.position, self.written, self.text = 0, 0, []

    def prefill(self, tokens):
        self._take(tokens)

    def decode(self, token):
        # What it did not write itself is the next message.
        if self.written in (0, len(self.tokens)) or token != self.tokens[self.written - 1]:
            self.written = 0
        self._take([token])
        time.sleep(self.seconds)
        logits = np.zeros(257, np.float32)
        logits[self.tokens[self.written]] = 1
        self.written += 1
        return logits

    def _take(self, tokens):
        self.text += tokens
        self.position += len(tokens)
        assert self.position <= self.context


class Session:
    def __init__(self, stepper):
        self.stepper = stepper


def make(text, context=4096, seconds=0.0):
    """A conversation with such a model."""
    tokenizer = byte_tokenizer()
    tokens = [*tokenizer(text).input_ids, END]
    return Conversation(Session(Scripted(tokens, context, seconds)), tokenizer, (END,), "scripted", plain=False)


if __name__ == "__main__":
    interrupt.listen()
    given = [*sys.argv[1:], "4096", "0"][:3] if len(sys.argv) == 2 else [*sys.argv[1:], "0"][:3]
    talk = make(given[0], int(given[1]), float(given[2]))
    print("ready", flush=True)
    sys.exit(converse(talk, None, 64))
