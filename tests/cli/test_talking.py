"""A conversation as a person has it at a terminal: what stops it, what it forgets, and what it says of both."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgeship.errors import UsageError

sys.path.insert(0, str(Path(__file__).parent))
from scripted import make

PROGRAM = Path(__file__).with_name("scripted.py")


class Terminal:
    """A program at a terminal of its own."""

    def __init__(self, *arguments: object) -> None:
        self.master, slave = pty.openpty()
        command = [sys.executable, str(PROGRAM), *map(str, arguments)]
        self.process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
        os.close(slave)
        self.seen, self.read = b"", 0

    def until(self, text: str, seconds: float = 60) -> str:
        """What is printed until a text comes, behind the last that was waited for."""
        end = time.monotonic() + seconds
        while (place := self.seen.find(text.encode(), self.read)) < 0:
            assert time.monotonic() < end, f"{text!r} did not come, but {self.seen[self.read :].decode()!r}"
            if select.select([self.master], [], [], 0.2)[0]:
                self.seen += os.read(self.master, 4096)
        found = self.seen[self.read : place + len(text.encode())].decode()
        self.read = place + len(text.encode())
        return found

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def press(self) -> None:
        """Ctrl-C."""
        self.process.send_signal(signal.SIGINT)

    def code(self) -> int:
        """How it ended."""
        end = time.monotonic() + 30
        while self.process.poll() is None and time.monotonic() < end:
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self.master, 4096)
                except OSError:
                    break
        return self.process.wait(10)


@pytest.fixture
def terminal():
    opened = []

    def start(*arguments: object) -> Terminal:
        opened.append(Terminal(*arguments))
        opened[-1].until("> ")
        return opened[-1]

    yield start
    for item in opened:
        item.process.kill()
        item.process.wait()
        os.close(item.master)


def test_a_press_stops_the_answer_and_keeps_the_conversation(terminal):
    shell = terminal("abcdefghijklmnopqrstuvwxyz" * 2, 4096, 0.05)
    shell.type("hello\n")
    shell.until("cde")
    shell.press()
    assert "stopped; the conversation goes on from what was written" in shell.until("]")
    shell.until("> ")
    shell.type("more\n")
    assert "abc" in shell.until("defg")
    shell.press()
    shell.until("> ")
    # At the prompt it leaves; between the prompt and the read behind it, Python would only see the next press.
    time.sleep(0.3)
    shell.press()
    assert shell.code() == 130
    assert "left; what was said is not kept" in shell.seen.decode()
    assert "run the same command again" not in shell.seen.decode()
    assert "Traceback" not in shell.seen.decode()


def test_a_press_before_the_first_word_takes_the_message_back(terminal):
    shell = terminal("abc", 4096, 0.3)
    shell.type("hello there\n")
    shell.until("hello there")
    time.sleep(0.3)
    shell.press()
    assert "the message is taken back" in shell.until("]")
    shell.until("> ")
    shell.type("/exit\n")
    assert shell.code() == 0


def test_commands(terminal):
    shell = terminal("fine")
    shell.type("\n")
    shell.until("> ")
    shell.type("/help\n")
    helped = shell.until("Ctrl-C stops an answer")
    assert "/new" in helped
    assert "/exit" in helped
    shell.type("/nwe\n")
    assert "there is no /nwe; /help says what there is" in shell.until("]")
    shell.type("/new\n")
    shell.until("what was said is forgotten")
    shell.type("say\n")
    assert "fine" in shell.until("tokens/s]")
    shell.type("\x04")
    assert shell.code() == 0


def test_a_full_context_is_said_and_the_conversation_goes_on(terminal):
    shell = terminal("0123456789", 64)
    for _ in range(6):
        shell.type("four\n")
        assert "0123456789" in shell.until("]")
    assert "the context of 64 tokens is full: the oldest 2 messages are forgotten" in shell.seen.decode()
    shell.type("x" * 100 + "\n")
    assert "this message is 105 tokens, and the context holds 64" in shell.until("]")
    shell.type("four\n")
    assert "0123456789" in shell.until("]")


@pytest.mark.parametrize("text", ["añ€🙂b", "家族", "👩‍👩‍👧 é", "🙂"])
def test_no_part_of_a_character_is_shown(text):
    talk = make(text)
    pieces = list(talk.say("x", 64))
    assert "".join(pieces) == text
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)
    assert talk.turns[-1]["content"] == text
    # Cut inside its last character, it ends before that.
    cut = make(text)
    whole = "".join(cut.say("x", len(text.encode()) - 1))
    assert whole == text[:-1]
    assert cut.remarks == [f"cut off after {len(text.encode()) - 1} tokens"]


def test_a_turn_is_whole_or_not_there():
    talk = make("abcdef")
    answer = talk.say("x", 64)
    assert next(answer) == "a"
    answer.close()
    assert talk.turns == [{"role": "user", "content": "x"}, {"role": "assistant", "content": "a"}]
    talk.stopped = lambda: True
    assert list(talk.say("y", 64)) == []
    assert [turn["content"] for turn in talk.turns] == ["x", "a"]
    talk.stopped = lambda: False

    def fails(logits):
        raise MemoryError

    talk.pick = fails
    with pytest.raises(MemoryError):
        list(talk.say("z", 64))
    assert [turn["content"] for turn in talk.turns] == ["x", "a"]
    with pytest.raises(UsageError, match=r"this message is 5005 tokens, and the context holds 4096"):
        list(talk.say("z" * 5000, 64))
    assert [turn["content"] for turn in talk.turns] == ["x", "a"]


def test_what_the_cache_holds_is_not_read_again():
    talk = make("abc")
    list(talk.say("x", 64))
    stepper = talk.session.stepper
    before = stepper.position
    taken = []
    stepper.prefill = lambda tokens: (taken.extend(tokens), type(stepper).prefill(stepper, tokens))
    list(talk.say("y", 64))
    assert len(taken) < before
    prompt = talk.tokenizer.apply_chat_template(talk.turns, tokenize=True)
    assert stepper.text == [int(token) for token in getattr(prompt, "input_ids", prompt)][: stepper.position]
    assert [turn["content"] for turn in talk.turns] == ["x", "abc", "y", "abc"]


def test_a_template_that_refuses_is_told(cli):
    talk = make("abc")
    talk.tokenizer.chat_template = "{{ raise_exception('only pairs') }}"
    with pytest.raises(UsageError, match="refuses this conversation: only pairs"):
        list(talk.say("x", 8))
    assert talk.turns == []
