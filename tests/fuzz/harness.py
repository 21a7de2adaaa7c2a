"""A seeded fuzz harness: makes a bad input, runs a command on it, and checks what must hold whatever the input is.

What must hold: a documented exit code and never 70, one line for an error, no code of the input's run (a canary), no
file outside of ``-o``, nothing of the user's changed, at most 60 seconds and 4 GB.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import select
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MOST_SECONDS = 60.0
MOST_BYTES = 4 << 30
CODES = range(9 + 1)
CHILD = Path(__file__).with_name("child.py")
# What a build may leave beside what it is told: its folder, its log, what Python compiles.
ALLOWED = ("out", "out.log", "__pycache__")


@dataclass
class Place:
    """Where one case is made and run. Args: canary: a file that only code of the input's makes."""

    folder: Path
    canary: Path
    random: random.Random


Maker = Callable[[Place], list[object]]


@dataclass
class Ended:
    """How a command ended: its exit code, or the signal as a negative number; what it said."""

    code: object
    seconds: float
    peak: int
    out: str
    err: str


class Child:
    """A process that runs one command after another; a new one after a crash or a hang."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.process: subprocess.Popen[bytes] | None = None
        self.answers = -1

    def _start(self) -> subprocess.Popen[bytes]:
        ours, theirs = os.pipe()
        self.answers = ours
        environment = {
            **os.environ, "EDGESHIP_CACHE": str(self.home / "cache"), "HOME": str(self.home / "home"),
            "TMPDIR": str(self.home / "tmp"), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        for name in ("cache", "home", "tmp"):
            (self.home / name).mkdir(parents=True, exist_ok=True)
        process = subprocess.Popen(
            [sys.executable, str(CHILD), str(theirs)], stdin=subprocess.PIPE, pass_fds=(theirs,), env=environment,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs)
        return process

    def run(self, folder: Path, arguments: list[object], streams: Path) -> Ended:
        """Run a command in a folder."""
        if self.process is None or self.process.poll() is not None:
            self.process = self._start()
        out, err = streams / "stdout", streams / "stderr"
        order = {"folder": str(folder), "arguments": list(map(str, arguments)), "out": str(out), "err": str(err)}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order).encode() + b"\n")
        self.process.stdin.flush()
        # Libraries are loaded in the first case of a process, on a machine that may be busy.
        ready, _, _ = select.select([self.answers], [], [], 3 * MOST_SECONDS)
        line = _line(self.answers) if ready else b""
        said = out.read_text(errors="replace") if out.is_file() else "", err.read_text(errors="replace")
        if line:
            found = json.loads(line)
            return Ended(found["code"], found["seconds"], found["peak"], *said)
        if not ready:
            self.process.kill()
        code = self.process.wait()
        self.process = None
        return Ended(
            "hangs" if not ready else f"ended by signal {-code}", 3 * MOST_SECONDS if not ready else 0, 0, *said
        )

    def stop(self) -> None:
        """End the process."""
        if self.process is not None and self.process.poll() is None:
            assert self.process.stdin is not None
            self.process.stdin.close()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def _line(descriptor: int) -> bytes:
    found = b""
    while not found.endswith(b"\n"):
        part = os.read(descriptor, 65536)
        if not part:
            return b""
        found += part
    return found


def run_case(child: Child, base: Path, maker: Maker, seed: int) -> str:
    """Make one case and run it. Returns what does not hold, in words; empty when all does."""
    folder, streams = base / "case", base / "streams"
    for place in (folder, streams):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
    canary = base / "canary"
    place = Place(folder, canary, random.Random(seed))
    (folder / "precious.txt").write_text("mine")
    arguments = maker(place)
    before, around = _contents(folder), {item.name for item in base.iterdir()}
    ended = child.run(folder, arguments, streams)
    problems = [*_ended_badly(ended)]
    if canary.exists():
        problems.append("code of the input ran")
        canary.unlink()
    after = _contents(folder)
    changed = [name for name, digest in before.items() if after.get(name) != digest]
    new = [
        name for name in after if name not in before and name.split("/")[0] not in ALLOWED and "__pycache__" not in name
    ]
    strays = {item.name for item in base.iterdir()} - around - {"cache", "home", "tmp"}
    if (base / "tmp").is_dir():
        # onnxruntime-genai's own: switched off only once it is imported.
        strays |= {f"tmp/{item.name}" for item in (base / "tmp").iterdir() if item.is_file() and item.name != ".ses"}
    if changed:
        problems.append(f"changed or lost: {changed[:3]}")
    if new or strays:
        problems.append(f"files outside of -o: {[*new, *strays][:3]}")
    if not problems:
        return ""
    last = ended.err.strip().splitlines()[-1][:300] if ended.err.strip() else ""
    return f"{'; '.join(problems)} | edgeship {' '.join(map(str, arguments))[:300]} | {last}"


def _ended_badly(ended: Ended) -> list[str]:
    problems = []
    if ended.code not in CODES:
        problems.append(f"exit {ended.code}")
    elif ended.code and not any(line.startswith("error: ") for line in ended.err.splitlines()):
        problems.append(f"exit {ended.code} without an error line")
    if "Traceback" in ended.err or "Traceback" in ended.out:
        problems.append("a traceback")
    if ended.seconds > MOST_SECONDS:
        problems.append(f"{ended.seconds:.0f} s")
    if ended.peak > MOST_BYTES:
        problems.append(f"{ended.peak / 1e9:.1f} GB")
    return problems


def _contents(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.stat().st_size < 1 << 26:
            found[path.relative_to(folder).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found
