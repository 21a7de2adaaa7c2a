"""Runs command after command in one process, and says how each ended: a line of JSON in, a line of JSON out.

What it is told: the folder to stand in, the arguments, where the streams go. Its memory is bounded, so that a case that
asks for too much gets a MemoryError here and not the machine's attention.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path

MEMORY_BYTES = 10 << 30


def peak_bytes() -> int:
    """The most memory this process held since `forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return 0


def forget_peak() -> None:
    """Begin counting anew."""
    Path("/proc/self/clear_refs").write_text("5")


def one(order: dict[str, object]) -> dict[str, object]:
    """Run a command as the process would."""
    from edgeship.cli.main import answer

    streams = sys.stdout, sys.stderr
    saved = os.dup(1), os.dup(2)
    os.chdir(str(order["folder"]))
    with open(str(order["out"]), "w") as out, open(str(order["err"]), "w", buffering=1) as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        sys.stdout, sys.stderr = out, err
        sys.argv = ["edgeship", *map(str, order["arguments"])]  # type: ignore[call-overload]
        forget_peak()
        begin = time.monotonic()
        try:
            code: object = answer()
        except SystemExit as error:
            code = error.code
        except BaseException as error:  # told to the parent, which fails the case
            code = f"{type(error).__name__}: {error}"
        finally:
            sys.stdout, sys.stderr = streams
            os.dup2(saved[0], 1)
            os.dup2(saved[1], 2)
            for number in saved:
                os.close(number)
    return {"code": code, "seconds": time.monotonic() - begin, "peak": peak_bytes()}


def main() -> None:
    """Until the orders end. Answers go to the descriptor that the first argument names."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 30, 4 << 30))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers = os.fdopen(int(sys.argv[1]), "w", buffering=1)
    for line in sys.stdin:
        answers.write(json.dumps(one(json.loads(line))) + "\n")


if __name__ == "__main__":
    main()
