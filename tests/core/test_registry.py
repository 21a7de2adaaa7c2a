"""Passes, runtimes, targets and profiles from other packages; a broken one is shown, and breaks nothing."""

import json
import sys
import textwrap
from importlib import metadata

import pytest

from edgeship.core import plugins, registry
from edgeship.errors import UsageError

GOOD = """
    from dataclasses import dataclass
    from typing import ClassVar
    from edgeship.core.model import TorchModel
    from edgeship.core.passes import Context, Pass, Skip

    @dataclass(frozen=True)
    class Polish(Pass):
        '''Do nothing, well.'''
        name: ClassVar[str] = "compress/polish"

        @classmethod
        def plan(cls, request):
            return Skip("nothing to polish")

        def run(self, model: TorchModel, ctx: Context) -> TorchModel:
            return model
"""


@pytest.fixture
def plug(tmp_path, monkeypatch):
    """``plug(code, group, "name = module:object")``: an installed distribution with one entry point."""
    count = 0

    def install(code: str, group: str, point: str) -> None:
        nonlocal count
        count += 1
        module = point.partition("=")[2].strip().partition(":")[0]
        place = tmp_path / f"site{count}"
        info = place / f"plug{count}-1.0.dist-info"
        info.mkdir(parents=True)
        (place / f"{module}.py").write_text(textwrap.dedent(code))
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: plug{count}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n{point}\n")
        monkeypatch.syspath_prepend(str(place))
        monkeypatch.delitem(sys.modules, module, raising=False)
        forget()

    yield install
    monkeypatch.undo()
    forget()


def forget():
    for ask in (registry.passes, registry.runtimes, registry.targets, registry.profiles, registry.families):
        ask.cache_clear()
    plugins._broken.clear()


def test_a_pass_from_another_package_is_there(plug):
    plug(GOOD, "edgeship.passes", "polish = plug_polish:Polish")
    assert registry.passes()["compress/polish"].summary() == "Do nothing, well."
    assert registry.broken() == ()


BROKEN = [
    ("raise RuntimeError('old')", "edgeship.passes", "p = plug_a:P", "RuntimeError: old"),
    ("import nowhere_to_be_found", "edgeship.passes", "p = plug_b:P", "ModuleNotFoundError"),
    ("import sys; sys.exit(3)", "edgeship.passes", "p = plug_c:P", "SystemExit"),
    ("def P(:", "edgeship.runtimes", "p = plug_d:P", "SyntaxError"),
    ("P = 3", "edgeship.passes", "p = plug_e:P", "is not a Pass"),
    ("Q = 3", "edgeship.passes", "p = plug_f:P", "AttributeError"),
    ("P = 3", "edgeship.runtimes", "p = plug_g:P", "is not a Runtime"),
    (GOOD.replace("compress/polish", "compress/quantize"), "edgeship.passes", "p = plug_h:Polish", "exists already"),
    (GOOD.replace('name: ClassVar[str] = "compress/polish"', ""), "edgeship.passes", "p = plug_i:Polish", "no name"),
    (GOOD.replace("@dataclass(frozen=True)", ""), "edgeship.passes", "p = plug_j:Polish", "frozen dataclass"),
    (GOOD.replace("def run(self, model: TorchModel", "def run(self, model: 'Nothing'"), "edgeship.passes",
     "p = plug_k:Polish", "annotations of run"),
    ("def P(): return 3", "edgeship.targets", "p = plug_l:P", "expected str, bytes or os.PathLike"),
    ("from edgeship.runtimes.onnxruntime import RUNTIME as P", "edgeship.runtimes", "p = plug_m:P", "exists already"),
]  # fmt: skip


@pytest.mark.parametrize(("code", "group", "point", "reason"), BROKEN, ids=[row[2].split()[2] for row in BROKEN])
def test_a_broken_plug_in_is_kept_with_its_reason(plug, code, group, point, reason):
    before = registry.passes().keys(), registry.runtimes().keys(), registry.targets().keys()
    plug(code, group, point)
    (item,) = registry.broken()
    assert (item.group, item.name) == (group, "p")
    assert reason.lower() in item.reason.lower()
    assert (registry.passes().keys(), registry.runtimes().keys(), registry.targets().keys()) == before


def test_a_target_from_another_package(plug, tmp_path, root):
    folder = tmp_path / "facts"
    folder.mkdir()
    text = (root / "targets" / "pixel8.toml").read_text()
    (folder / "toaster.toml").write_text(text.replace('name = "pixel8"', 'name = "toaster"'))
    plug(f"def folder(): return {str(folder)!r}", "edgeship.targets", "toaster = plug_t:folder")
    assert registry.targets()["toaster"].title == registry.targets()["pixel8"].title


def test_a_plug_in_never_replaces_a_target_quietly(plug, tmp_path, root):
    folder = tmp_path / "facts"
    folder.mkdir()
    text = (root / "targets" / "pixel8.toml").read_text()
    (folder / "pixel8.toml").write_text(text.replace("Google Pixel 8", "Changed"))
    plug(f"def folder(): return {str(folder)!r}", "edgeship.targets", "again = plug_u:folder")
    assert "Changed" not in registry.targets()["pixel8"].title
    assert registry.broken()[0].reason == "pixel8 exists already"


def test_a_broken_target_file_is_shown(plug, tmp_path):
    folder = tmp_path / "facts"
    folder.mkdir()
    (folder / "half.toml").write_text('name = "half"')
    plug(f"def folder(): return {str(folder)!r}", "edgeship.targets", "half = plug_v:folder")
    assert "half.toml: key 'title' is missing" in registry.broken()[0].reason
    assert "half" not in registry.targets()


def test_doctor_shows_broken_plug_ins_and_a_build_goes_on(plug, cli, tiny_order):
    plug("raise RuntimeError('old')", "edgeship.runtimes", "rusty = plug_r:R")
    fails = GOOD.replace('return Skip("nothing to polish")', "return request.no_such_thing")
    plug(fails, "edgeship.passes", "shaky = plug_s:Polish")
    found = json.loads(cli("doctor", "--json").out)
    assert [item["name"] for item in found["broken_plugins"]] == ["rusty"]
    assert "broken plug-in rusty (edgeship.runtimes): RuntimeError: old" in cli("doctor").out
    planned = cli("plan", *tiny_order)
    assert planned.code == 0, planned.err
    assert "compress/polish skipped: its plug-in failed: AttributeError" in " ".join(planned.out.split())
    built = cli("build", *tiny_order, "-o", "out")
    assert built.code == 0, built.err


def test_the_variable_leaves_plug_ins_out(plug, monkeypatch):
    monkeypatch.setenv("EDGESHIP_NO_PLUGINS", "1")
    plug("raise RuntimeError('old')", "edgeship.passes", "p = plug_w:P")
    assert registry.broken() == ()


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match='no target "iphone15"; did you mean iphone15pro\\?'):
        registry.find("target", registry.targets(), "iphone15")


def test_the_package_adds_its_own_entry_point_for_the_command():
    (point,) = [p for p in metadata.distribution("edgeship").entry_points if p.group == "console_scripts"]
    assert (point.name, point.value) == ("edgeship", "edgeship.cli.main:main")
