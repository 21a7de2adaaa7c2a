"""Try the wheel in an environment of other versions: install it, run tests there, build a network there.

    python scripts/check_environment.py "torch 2.14.1" --before torch==2.14.1 --before torchvision==0.29.1
    python scripts/check_environment.py "Python 3.13" --python python3.13 --constraints constraints/tested.txt

What is installed before must have the same version after it. The tests are the quick ones of the whole suite, or those
that ``--tests`` names. With torchvision there, its MobileNetV3-small is built for four runtimes. What came out is kept
in docs/results/other-environments.json, and docs/results/other-environments.md is written again from it. An environment
takes up to 8 GB (torch with CUDA); it is removed at the end unless ``--keep`` is given, and one that was kept is used
again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name

from edgeship.core.installed import read_constraints

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "docs" / "results" / "other-environments.json"
PAGE = RECORD.with_suffix(".md")
PIP = ("python", "-m", "pip", "--disable-pip-version-check")
EXTRAS = "all,test,minilm"
RUNTIMES = ("onnx", "coreml", "coreai", "tflite")
# Rows of the table that say which versions were tried.
SHOWN = ("torch", "torchvision", "numpy", "onnx", "onnxscript", "onnxruntime", "transformers", "optimum")
NETWORK = '''
"""torchvision's MobileNetV3-small with seeded weights, its statistics those of some images of noise."""
import torch, torchvision

def network():
    torch.manual_seed(0)
    model = torchvision.models.mobilenet_v3_small(weights=None, dropout=0.0)
    torch.nn.init.normal_(model.classifier[-1].weight, std=0.1)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        for _ in range(2):
            model(torch.rand(16, 3, 224, 224))
    return model.eval()
'''
INTRODUCTION = """# Other environments

Made by `python scripts/check_environment.py`. Each part is an environment of its own into which the wheel was installed
with every extra, by a plain `pip install` or with the constraints named; the network was built with that wheel, the
tests are the repository's own, run from a copy of the checkout. The set that everything else in these pages was
measured with is `constraints/tested.txt`.
"""


class Environment:
    """A virtual environment outside the checkout, and what runs in it."""

    def __init__(self, folder: Path, python: str) -> None:
        self.folder = folder
        self.bin = folder / "venv" / "bin"
        if not self.bin.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            subprocess.run([python, "-m", "venv", str(folder / "venv")], check=True)

    def run(self, *command: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        """A command of the environment, away from the checkout: what is imported is what is installed."""
        program, *arguments = map(str, command)
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
        environment |= {"PYTHONSAFEPATH": "1", "EDGESHIP_CACHE": str(self.folder / "cache")}
        if (ROOT.parent / "shared").is_dir():
            environment.setdefault("EDGESHIP_SHARED", str(ROOT.parent / "shared"))
        done = subprocess.run(
            [str(self.bin / program), *arguments],
            cwd=self.folder / "source",
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if check and done.returncode:
            sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
        return done

    def versions(self) -> dict[str, str]:
        """Distribution -> version, of everything that is installed."""
        listed = json.loads(self.run("python", "-m", "pip", "list", "--format", "json").stdout)
        return {row["name"].lower(): row["version"] for row in listed}


def copy_source(place: Path) -> None:
    """The files of the checkout that git knows or would add, without what was built."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode()
    shutil.rmtree(place, ignore_errors=True)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, place / name)


def install(environment: Environment, before: list[str], constraints: Path | None) -> dict[str, str]:
    """Install what is to be there before, then the wheel with every extra. Returns all versions.

    Exits when a version of what was there before has changed, or something installed does not fit together.
    """
    if before and "edgeship" not in environment.versions():
        environment.run(*PIP, "install", "--quiet", *before)
    there = {name: version for name, version in environment.versions().items() if name != "edgeship"}
    wheels = environment.folder / "wheels"
    shutil.rmtree(wheels, ignore_errors=True)
    environment.run(*PIP, "wheel", "--quiet", "--no-deps", "--wheel-dir", wheels, environment.folder / "source")
    (wheel,) = wheels.glob("*.whl")
    chosen = ("--constraint", constraints.resolve()) if constraints else ()
    environment.run(*PIP, "install", "--quiet", *chosen, f"{wheel}[{EXTRAS}]")
    environment.run(*PIP, "install", "--quiet", "--no-deps", "--force-reinstall", wheel)
    environment.run(*PIP, "check")
    after = environment.versions()
    named = {item.partition("==")[0].lower() for item in before}
    moved = {name: (there[name], after.get(name)) for name in named if there.get(name) != after.get(name)}
    if moved:
        sys.exit(f"installing edgeship changed what was there: {moved}")
    return after


def run_tests(environment: Environment, place: str, jobs: str) -> dict[str, Any]:
    """Run the quick tests of one file or folder of the copied checkout, which is installed in place of the wheel.

    Returns counts, the names of what failed, and the seconds it took.
    """
    report = environment.folder / "tests.xml"
    report.unlink(missing_ok=True)
    options = ("-m", "not heavy", "-q", "-p", "no:cacheprovider", f"--junitxml={report}")
    done = environment.run("pytest", "-n", jobs, "--dist", "loadgroup", *options, place, check=False)
    if not report.is_file():
        sys.exit(f"pytest {place} ended with {done.returncode}:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    (environment.folder / f"{place.replace('/', '-')}.log").write_text(done.stdout + done.stderr, encoding="utf-8")
    (suite,) = ElementTree.parse(report).getroot().iter("testsuite")
    broken = [case for case in suite.iter("testcase") if {"failure", "error"} & {part.tag for part in case}]
    skipped = int(suite.attrib["skipped"])
    return {
        "passed": int(suite.attrib["tests"]) - len(broken) - skipped,
        "skipped": skipped,
        "failed": [f"{case.attrib['classname']}::{case.attrib['name']}" for case in broken],
        "seconds": round(float(suite.attrib["time"])),
    }


def build_network(environment: Environment) -> dict[str, str]:
    """Build torchvision's MobileNetV3-small for four runtimes; what check/verify says of each."""
    factory = environment.folder / "network.py"
    factory.write_text(NETWORK, encoding="utf-8")
    order = ["build", f"{factory}:network", "--input", "image:f32[1,3,224,224]", "--runtime", ",".join(RUNTIMES)]
    targets = ["--target", "iphone15pro", "--target", "galaxy-s24"]
    out = environment.folder / "bundle.edgeship"
    shutil.rmtree(out, ignore_errors=True)
    done = environment.run("edgeship", *order, *targets, "-o", out, "--json", check=False)
    if done.returncode:
        return {"build": f"failed with exit code {done.returncode}: {done.stderr.strip().splitlines()[-1:]}"}
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    return {artifact["runtime"]: artifact["verified"] for artifact in manifest["artifacts"]}


def page(rows: dict[str, Any]) -> str:
    """The page, from the record."""
    parts = [INTRODUCTION]
    for name, row in sorted(rows.items()):
        versions = ", ".join(f"{key} {row['versions'][key]}" for key in SHOWN if key in row["versions"])
        parts.append(f"## {name}\n\n{row['date']}, {row['system']}, Python {row['python']}; {versions}.\n")
        if row["before"]:
            parts.append(f"Installed before edgeship and unchanged by it: {', '.join(row['before'])}.\n")
        parts.append(
            f"Other than the tested set of that day (in brackets): {', '.join(row.get('other', [])) or 'nothing'}.\n"
        )
        if "network" in row:
            parts.append("| torchvision MobileNetV3-small for | check/verify |\n|---|---|")
            for runtime, summary in sorted(row["network"].items()):
                parts.append(f"| {runtime} | {summary.partition(';')[0]} |")
            parts.append("")
        if "tests" in row:
            parts.append("| quick tests of | passed | failed | skipped | seconds |\n|---|---|---|---|---|")
            for place, ran in sorted(row["tests"].items()):
                failed = len(ran["failed"])
                parts.append(f"| {place} | {ran['passed']} | {failed} | {ran['skipped']} | {ran['seconds']} |")
            parts.append("")
            for _, ran in sorted(row["tests"].items()):
                parts += [f"- failed: `{test}`" for test in ran["failed"]]
            if row.get("note"):
                parts.append(f"\n{row['note']}\n")
            if row.get("left"):
                parts.append(f"Not run here: {', '.join(row['left'])}.\n")
    return "\n".join(parts).rstrip() + "\n"


def other_versions(versions: dict[str, str]) -> list[str]:
    """What is not in the tested set, with the tested version in brackets."""
    tested = read_constraints(ROOT / "constraints" / "tested.txt")
    found = []
    for name, version in sorted(versions.items()):
        wanted = tested.get(canonicalize_name(name))
        if wanted and wanted != version.partition("+")[0]:
            found.append(f"{name} {version} ({wanted})")
    return found


def quick_places() -> list[str]:
    """Every folder and file of tests, in the order of their names."""
    holds = [path for path in (ROOT / "tests").iterdir() if path.is_dir() and any(path.rglob("test_*.py"))]
    return [f"tests/{path.name}" for path in sorted([*holds, *(ROOT / "tests").glob("test_*.py")])]


def read_record() -> dict[str, Any]:
    """Row by name; none where nothing was run yet."""
    return dict(json.loads(RECORD.read_text(encoding="utf-8"))) if RECORD.is_file() else {}


def keep_record(name: str, row: dict[str, Any]) -> None:
    """Put a row in the record, and write the page from it."""
    rows = {**read_record(), name: row}
    RECORD.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    PAGE.write_text(page(rows), encoding="utf-8")


def main() -> None:
    """As the module says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the row in the record")
    parser.add_argument("--python", default=sys.executable, help="interpreter to make the environment with")
    parser.add_argument("--before", action="append", default=[], metavar="NAME==VERSION")
    parser.add_argument(
        "--constraints", type=Path, help="file for pip -c; without it, the newest that the ranges allow"
    )
    parser.add_argument("--tests", nargs="*", default=[], help="test files or folders instead of all quick tests")
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument("--note", default="", help="what to know about what failed, for the page")
    parser.add_argument("--jobs", default="1")
    parser.add_argument("--more", action="store_true", help="keep what the record has of this name, and add to it")
    parser.add_argument("--folder", type=Path, help="where the environment is made")
    parser.add_argument("--keep", action="store_true", help="do not remove the environment")
    asked = parser.parse_args()
    folder = (asked.folder or Path(tempfile.mkdtemp(prefix="edgeship-environment-"))).resolve()
    environment = Environment(folder, asked.python)
    copy_source(folder / "source")
    versions = install(environment, asked.before, asked.constraints)
    facts = "import platform; print(platform.python_version(), platform.system(), platform.machine())"
    python, *system = environment.run("python", "-c", facts).stdout.split()
    row: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "python": python,
        "system": " ".join(system),
        "before": asked.before,
        "note": asked.note,
        "versions": versions,
        "other": other_versions(versions),
    }
    if asked.more:
        row = read_record()[asked.name] | row
    if "torchvision" in versions and "network" not in row:
        row["network"] = build_network(environment)
        keep_record(asked.name, row)
    # The tests are those of a checkout: its own samples may run their Python.
    environment.run(*PIP, "install", "--quiet", "--no-deps", "--editable", folder / "source")
    left = [] if asked.no_tests else asked.tests or quick_places()
    row["left"] = sorted({*quick_places(), *left} - row.get("tests", {}).keys())
    while left:
        place = left.pop(0)
        row.setdefault("tests", {})[place] = run_tests(environment, place, asked.jobs)
        row["left"] = [name for name in row["left"] if name != place]
        keep_record(asked.name, row)  # after each: a run that is cut off has said what it saw
    print(json.dumps({key: row[key] for key in ("network", "tests") if key in row}, indent=1))
    if not asked.keep:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
