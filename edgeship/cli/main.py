"""The ``edgeship`` command. Libraries are imported inside the commands, so that help answers at once."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import click

from edgeship.cli import interrupt
from edgeship.core.decoder import CACHE_BITS
from edgeship.errors import BUG, ArtifactError, EdgeshipError, UsageError, meaning_of
from edgeship.version import __version__

F = TypeVar("F", bound=Callable[..., Any])
INTERNAL_ERROR = BUG


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="edgeship")
def cli() -> None:
    """Take a trained model to verified artifacts for a phone or a board."""


def order_options(command: F) -> F:
    """The options that ``build`` and ``plan`` share."""
    options = [
        click.argument("source"),
        click.option(
            "--target",
            "targets",
            multiple=True,
            metavar="NAME",
            help="Target device, from `edgeship targets`. Repeat for several.",
        ),
        click.option(
            "--runtime",
            "runtimes",
            metavar="A,B",
            help="Build for these runtimes only. Default: every runtime of the target.",
        ),
        click.option(
            "--profile",
            default="balanced",
            show_default=True,
            metavar="NAME",
            help="Precision to aim for, from `edgeship profiles`, or a file.",
        ),
        click.option(
            "--weights",
            metavar="ENC",
            help="Encoding of the weights instead of the profile's, such as int8 or int4-g32.",
        ),
        click.option(
            "--activations",
            type=click.Choice(["float", "dynamic", "int8", "int16"]),
            help="Activations to compute in instead of the profile's.",
        ),
        click.option(
            "-o", "--output", metavar="DIR", help="Folder for the bundle. Default: NAME.edgeship in the current folder."
        ),
        click.option(
            "--input",
            "inputs",
            multiple=True,
            metavar="SPEC",
            help="Shape of an input, name:f32[1,3,224,224]; for an ONNX file, name=16000 makes it a constant.",
        ),
        click.option(
            "--input-name", "input_names", multiple=True, metavar="OLD=NEW", help="Rename an input. Repeat for several."
        ),
        click.option(
            "--output-name",
            "output_names",
            multiple=True,
            metavar="[OLD=]NEW",
            help="Rename an output, or name each in order. Repeat for several.",
        ),
        click.option(
            "--cut",
            multiple=True,
            metavar="NAME",
            help="End the model at this value or module, before what follows is converted. Repeat for several.",
        ),
        click.option(
            "--factory", metavar="FILE:FUNCTION", help="Function that returns the module for a file of weights."
        ),
        click.option(
            "--weights-key",
            metavar="KEY",
            help="Which set of weights in a checkpoint, where several fit the model, such as model_ema.",
        ),
        click.option(
            "--calibration",
            metavar="DATA",
            help="Calibration inputs: .npz, .npy, images, file.py:function, or text (32768 tokens of it).",
        ),
        click.option("--eval", metavar="DATA", help="Evaluation inputs, with labels if accuracy is to be measured."),
        click.option(
            "--metric", metavar="NAME", help="Metric: accuracy, perplexity, cosine, snr, or file.py:function."
        ),
        click.option("--context", type=int, metavar="N", help="Context length of a language model, in tokens."),
        click.option(
            "--kv-cache", type=click.Choice(list(CACHE_BITS)), help="Data type of a language model's key-value cache."
        ),
        click.option(
            "--part",
            type=click.Choice(["encoder", "decoder"]),
            help="Which network of an encoder-decoder model to build.",
        ),
        click.option("--lora", metavar="DIR", help="PEFT adapter to merge into a language model."),
        click.option(
            "--adapter",
            "adapters",
            multiple=True,
            metavar="NAME=DIR",
            help="PEFT adapter to ship beside a language model. Repeat for several.",
        ),
        click.option("--max-size", metavar="SIZE", help="Largest size of each artifact, such as 3GB."),
        click.option("--max-drop", metavar="SHARE", help="Largest drop of the metric that is accepted, such as 1%."),
        click.option(
            "--keep",
            multiple=True,
            metavar="PATTERN[=ENC]",
            help="Weights with an encoding of their own, as *.stem.weight=int8; default float16. Repeat for several.",
        ),
        click.option(
            "--set",
            "settings",
            multiple=True,
            metavar="PASS.FIELD=VALUE",
            help="Set an option of a pass, such as compress/quantize.bits=8.",
        ),
        click.option(
            "--trust",
            is_flag=True,
            help="Allow code that comes with the source to run: Python named in a sample.toml, a pickled .pt2.",
        ),
        click.option(
            "--all-or-nothing",
            is_flag=True,
            help="Publish nothing unless every runtime takes the model and every check holds.",
        ),
        click.option(
            "--jobs",
            type=int,
            metavar="N",
            help="Runtimes to build at once, each in a process of its own. Default: by cores and free memory.",
        ),
        click.option("--no-cache", is_flag=True, help="Run every step again instead of taking it from the cache."),
        click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else on stdout."),
        click.option("-v", "--verbose", is_flag=True, help="Print the log of the libraries when the command ends."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@cli.command()
@order_options
@click.option("--dry-run", is_flag=True, help="Print the plan and stop, as `edgeship plan` does.")
def build(dry_run: bool, as_json: bool, verbose: bool, **given: Any) -> None:
    """Build a bundle: convert the model, run each artifact, compare it with the original, package."""
    from edgeship import api
    from edgeship.cli.printing import Shown, print_report, show_log
    from edgeship.engine.chatter import Log

    order = _order(**given)
    _tell_trust(order)
    if dry_run:
        _print_plan(order, as_json, verbose)
        return
    shown = Shown()
    log = Log(api.log_path(order.bundle))
    try:
        bundle = api.Bundle.built(order.bundle, api.run(order, shown, log))
    finally:
        shown.close()
        if verbose:
            show_log(log.path)
    if as_json:
        from edgeship.core.records import to_plain

        click.echo(json.dumps({**to_plain(bundle.report), "passed": bundle.passed}, indent=2))
    else:
        print_report(bundle.report)
    bundle.require()


@cli.command()
@order_options
def plan(as_json: bool, verbose: bool, **given: Any) -> None:
    """Print the steps that build would run, and why each other pass is skipped."""
    order = _order(**given)
    _tell_trust(order)
    _print_plan(order, as_json, verbose)


def _tell_trust(order: Any) -> None:
    """What ``--trust`` lets run, before it does."""
    from edgeship import api

    for line in api.trusted(order):
        click.echo(f"--trust lets run: {line}", err=True)


def _print_plan(order: Any, as_json: bool, verbose: bool) -> None:
    from edgeship import api
    from edgeship.cli.printing import Shown, show_log

    shown = Shown()
    log = api.side_log()
    try:
        made = api.plan_order(order, log, shown)
    finally:
        shown.close()
        if verbose:
            show_log(log.path)
    click.echo(json.dumps(made.plain(), indent=2) if as_json else made.text())


def _order(source: str, inputs: tuple[str, ...], settings: tuple[str, ...], no_cache: bool, **given: Any) -> Any:
    """What was said, as `edgeship.build` takes it."""
    from edgeship.api import make_order
    from edgeship.core.settings import parse_settings

    said = {name: value for name, value in given.items() if value is not None and value != ()}
    return make_order(source, inputs, **said, options=parse_settings(settings), cache=not no_cache)


@cli.command()
@click.argument("artifact", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else on stdout.")
def inspect(artifact: str, as_json: bool) -> None:
    """Show what is in a bundle: inputs, outputs, bits per weight, bytes and error by encoding and by layer."""
    from edgeship.cli.printing import print_inspection
    from edgeship.shipping.inspection import inspect_path

    found = inspect_path(Path(artifact))
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        print_inspection(found)


@cli.command()
@click.argument("bundle", type=click.Path())
@click.option("--no-run", is_flag=True, help="Compare the files with the manifest only; run nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else on stdout.")
def verify(bundle: str, no_run: bool, as_json: bool) -> None:
    """Check a bundle: that its files match the manifest, and that every artifact runs on this machine."""
    from edgeship import api
    from edgeship.shipping.bundle import REPLACED, told_of

    problems = api.verify(Path(bundle), run=not no_run, log=api.side_log())
    if as_json:
        click.echo(json.dumps({"bundle": bundle, "whole": not problems, "problems": problems}, indent=2))
    else:
        for problem in problems:
            click.echo(problem)
        if not problems:
            click.echo(f"{bundle} is whole" + ("" if no_run else ", and every artifact runs"))
    if problems:
        raise ArtifactError(f"{bundle}: {told_of(problems)}", fix=REPLACED)


@cli.command()
@click.argument("bundle", type=click.Path())
@click.option(
    "--device", default="host", show_default=True, metavar="DEVICE", help="host (this machine), or estimate:TARGET."
)
@click.option("--seconds", default=2.0, show_default=True, help="How long to time each artifact, in seconds.")
@click.option("--prompt", default=512, show_default=True, help="Language models: length of the prompt, in tokens.")
@click.option("--new", default=128, show_default=True, help="Language models: tokens to generate.")
@click.option(
    "--depth",
    default="0",
    show_default=True,
    help="Language models: tokens already in the cache, as a list such as 0,512,1024.",
)
@click.option(
    "--runs", default=3, show_default=True, help="Language models: number of timed runs, after one that is not counted."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else on stdout.")
def bench(
    bundle: str, device: str, seconds: float, prompt: int, new: int, depth: str, runs: int, as_json: bool
) -> None:
    """Measure latency and memory of each artifact on this machine, or estimate them for a device."""
    from edgeship import api
    from edgeship.cli.printing import print_bench
    from edgeship.cli.talking import is_text, print_text_bench
    from edgeship.core.device import TextOrder
    from edgeship.core.records import to_plain

    said = _said("prompt", "new", "depth", "runs")
    text = TextOrder(prompt, new, _depths(depth), runs) if said else None
    rows = api.bench(Path(bundle), seconds=seconds, device=device, text=text, said=said)
    if as_json:
        plain = [{"artifact": name, **to_plain(item)} for name, item in rows]
        click.echo(json.dumps(plain, indent=2))
    elif is_text(rows):
        print_text_bench(rows)
    else:
        print_bench(rows)


def _said(*names: str) -> tuple[str, ...]:
    """Those of some options that the command line gives, as it writes them."""
    source = click.get_current_context().get_parameter_source
    given = click.core.ParameterSource.COMMANDLINE
    return tuple(f"--{name}" for name in names if source(name) is given)


def _depths(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--depth {text!r} is no list of numbers", fix="write 0,512,1024") from None


@cli.command()
@click.argument("bundle", type=click.Path())
@click.option(
    "--runtime", metavar="NAME", help="Runtime to use. Default: the first in the bundle that is fast on this machine."
)
@click.option("--adapter", default="", metavar="NAME", help="Use this adapter of the bundle.")
@click.option("--prompt", metavar="TEXT", help="Send this prompt, print the answer and exit.")
@click.option("--max-tokens", default=256, show_default=True, help="Largest number of tokens to generate.")
@click.option(
    "--temperature", default=0.0, show_default=True, help="Sampling temperature; 0 always takes the most likely token."
)
@click.option("--top-k", default=40, show_default=True, help="Sample among this many of the most likely tokens.")
@click.option("--seed", default=0, show_default=True, help="Seed for sampling.")
@click.option("--plain", is_flag=True, help="Continue the prompt as plain text, without the model's chat template.")
def chat(
    bundle: str,
    runtime: str | None,
    adapter: str,
    prompt: str | None,
    max_tokens: int,
    temperature: float,
    top_k: int,
    seed: int,
    plain: bool,
) -> int:
    """Chat with a built language model through its runtime's own engine."""
    from edgeship.cli.talking import LEFT, converse
    from edgeship.conversation import open_conversation
    from edgeship.engine.chatter import hushed
    from edgeship.llm.generation import sampler

    if max_tokens < 1:
        raise UsageError(f"--max-tokens {max_tokens} writes nothing", fix="give at least 1")
    pick = sampler(temperature, top_k, seed)
    with (
        interrupt.saying(LEFT),
        hushed(),
        open_conversation(Path(bundle), runtime, plain=plain, adapter=adapter) as talk,
    ):
        talk.pick = pick
        return converse(talk, prompt, max_tokens)


@cli.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else on stdout.")
def targets(name: str | None, as_json: bool) -> None:
    """List the target devices, or show the facts about one and their sources."""
    from edgeship.cli.printing import print_target, print_targets
    from edgeship.core.records import to_plain
    from edgeship.core.registry import find
    from edgeship.core.registry import targets as known

    if name is not None:
        target = find("target", known(), name)
        click.echo(json.dumps(to_plain(target), indent=2)) if as_json else print_target(target)
    elif as_json:
        click.echo(json.dumps({key: to_plain(value) for key, value in known().items()}, indent=2))
    else:
        print_targets(known())


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else on stdout.")
def profiles(as_json: bool) -> None:
    """List the profiles: which precision each one aims for."""
    from edgeship.cli.printing import print_profiles
    from edgeship.core.records import to_plain
    from edgeship.core.registry import profiles as known

    if as_json:
        click.echo(json.dumps({key: to_plain(value) for key, value in known().items()}, indent=2))
    else:
        print_profiles(known())


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else on stdout.")
def passes(as_json: bool) -> None:
    """List the passes: what each one takes and makes, and its options for --set."""
    from edgeship.cli.printing import pass_rows, print_passes

    rows = pass_rows()
    if as_json:
        click.echo(json.dumps(rows, indent=2))
    else:
        print_passes(rows)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else on stdout.")
def runtimes(as_json: bool) -> None:
    """List the runtimes, and whether each one is installed and works on this machine."""
    from edgeship.api import availability
    from edgeship.cli.printing import print_runtimes
    from edgeship.core.records import to_plain

    rows = availability()
    click.echo(json.dumps(to_plain(rows), indent=2)) if as_json else print_runtimes(rows)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else on stdout.")
def doctor(as_json: bool) -> None:
    """Check this machine: installed runtimes, plug-ins, cache, disk space."""
    from edgeship.cli.diagnosis import diagnose, print_diagnosis
    from edgeship.core.records import to_plain

    found = diagnose()
    click.echo(json.dumps(to_plain(found), indent=2)) if as_json else print_diagnosis(found)


def main() -> None:
    """Entry point of the process."""
    # Threads that spin while they wait make small models twenty times slower on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    interrupt.listen()
    try:
        code = answer()
    except KeyboardInterrupt:  # while an error was being told
        code = interrupt.EXIT_CODE
    interrupt.ignore()
    if "coreai" in sys.modules:
        _leave(code)
    _hush()
    sys.exit(code)


def _hush() -> None:
    """What was said is out; LiteRT's libraries would still tell the terminal how they are taken down."""
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)


def answer() -> int:
    """Run the command in ``sys.argv``: one line for an error, its documented exit code, no traceback."""
    try:
        return cli.main(standalone_mode=False) or 0
    except (click.Abort, KeyboardInterrupt):
        return _stopped()
    except BrokenPipeError:
        return 141
    except Exception as error:
        # What a library makes of a press that it caught is no error of the model's.
        return _stopped() if interrupt.was_pressed() else _told(error)


def _stopped() -> int:
    click.echo(interrupt.message(), err=True)
    return interrupt.EXIT_CODE


def _told(error: Exception) -> int:
    """Say an error in one line; returns its exit code."""
    if not isinstance(error, EdgeshipError):
        # What the machine cannot do is no bug of ours, whichever library says it.
        error = meaning_of(error) or error
    if isinstance(error, EdgeshipError):
        click.echo(f"error: {error}", err=True)
        return error.exit_code
    if isinstance(error, click.ClickException):
        click.echo(f"error: {error.format_message().rstrip('.')}; see edgeship --help", err=True)
        return 2
    from edgeship.cli.diagnosis import write_crash
    from edgeship.core.plugins import author_of

    try:
        place = f"see {write_crash(error)}"
    except OSError as unwritten:  # no disk takes it: better here than nowhere
        traceback.print_exception(error)
        place = f"its log cannot be written: {unwritten.strerror}"
    reason = " ".join(str(error).split())[:200]
    author = author_of(error)
    owner = f"the plug-in {author}" if author else "edgeship"
    click.echo(f"error: a bug in {owner}: {type(error).__name__}: {reason}; {place}", err=True)
    return INTERNAL_ERROR


def _leave(code: int) -> None:
    """End without tearing the interpreter down.

    A thread of Core AI's that asks for the interpreter while it goes is ended by unwinding (until Python 3.14), and
    Swift aborts the process when its frames are unwound.
    """
    from edgeship.compat.python import run_exit_functions

    run_exit_functions()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
