"""The child process that runs steps of a build: ``python -m edgeship.engine.worker CALLS LIFE``.

CALLS is an open connection on which `Call` come in and `Said` and `Answer` go out; LIFE is a pipe that nobody writes
to and that ends with the build's process, however that ends. The child has a process group of its own, so that what it
starts ends with it.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import tempfile
import threading
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

from edgeship.core.passes import Context
from edgeship.core.plugins import author_of
from edgeship.core.registry import passes, runtimes
from edgeship.engine.calls import Answer, Call, Said, Warm, foreign, portable
from edgeship.engine.chatter import PartLog
from edgeship.engine.running import meant, run_pass

# How much sooner the kernel ends this process than others when memory is out: the build itself must go on.
FIRST_TO_GO = 500


def answer(call: Call, calls: Connection) -> Answer:
    """Run a pass; whatever it raises is part of the answer."""
    call.temporary.mkdir()
    os.environ["TMPDIR"] = tempfile.tempdir = str(call.temporary)
    log = PartLog(call.log)
    context = Context(
        call.folder,
        lambda done, total, what: calls.send(Said("progress", (done, total, what))),
        log.line,
        lambda line: calls.send(Said("say", (line,))),
        call.shared,
    )
    try:
        made = run_pass(call.task, call.inputs, context, log)
        if portable(made) is not made:
            raise TypeError(f"{call.task.name} made a {type(made).__name__}, which is not something a pass can make")
        return Answer(made)
    except Exception as error:
        log.line(traceback.format_exc())
        passes(), runtimes()  # which packages are plug-ins is known once they are loaded
        raised = meant(error, call.task.name)
        return Answer(None, raised if portable(raised) is raised else foreign(raised), author_of(error))
    finally:
        log.close()


def _end_with(life: int) -> None:
    """End with the process that started this one, and take along whatever was started here."""
    with suppress(OSError):
        while os.read(life, 1):
            pass
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _go_first() -> None:
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(FIRST_TO_GO))


def main(calls: Connection, life: int) -> None:
    """Answer until the connection ends."""
    for number in (calls.fileno(), life):
        # What a step starts must not keep them open.
        os.set_inheritable(number, False)
    threading.Thread(target=_end_with, args=(life,), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _go_first()
    while True:
        try:
            order = calls.recv()
        except EOFError:
            return
        except Exception as error:  # a pass or a model of a plug-in that cannot be imported here
            calls.send(Answer(None, foreign(error)))
            continue
        if isinstance(order, Warm):
            for name in order.modules:
                with suppress(Exception):
                    importlib.import_module(name)
        else:
            calls.send(answer(order, calls))


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])), int(sys.argv[2]))
    # Libraries of Core AI and Qualcomm sometimes crash while they are taken down.
    os._exit(0)
