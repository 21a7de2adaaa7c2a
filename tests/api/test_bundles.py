"""A bundle in Python: found by runtime, format or folder, read when asked, shown in a notebook without surprises."""

import dataclasses
import html.parser
import shutil

import numpy as np
import pytest

import edgeship
from edgeship.api.table import report_html
from edgeship.errors import ArtifactError, EdgeshipError

HOSTILE = "<script>alert('x')</script> & \"quoted\""


def test_a_bundle_is_opened_by_its_folder(tiny_bundle):
    bundle = edgeship.load(str(tiny_bundle))
    assert (len(bundle), [artifact.name for artifact in bundle]) == (1, ["onnx"])
    assert "onnx" in bundle
    assert "tflite" not in bundle
    assert 3 not in bundle
    artifact = bundle["onnx"]
    assert artifact.path == tiny_bundle / "onnx" / "model.onnx"
    assert artifact.size_bytes == artifact.path.stat().st_size
    assert artifact.targets == ("linux-x86",)
    assert artifact.row.runtime == artifact.runtime == "onnx"
    assert [str(spec) for spec in artifact.inputs] == ["image:f32[1,1,4,4]"]
    assert artifact.open()(np.zeros((1, 4, 4), "f")).shape == (1, 3)
    assert bundle.verify(run=False) == []
    assert bundle.inspect()["artifacts"][0]["main"] == "onnx/model.onnx"
    assert (bundle.passed, bundle.reasons, bundle.require()) == (True, (), bundle)


def test_figures_of_one_artifact_and_of_all(tiny_bundle):
    bundle = edgeship.load(tiny_bundle)
    mine = bundle["onnx"].bench(device="estimate:linux-x86")
    assert [("onnx/model.onnx", item) for item in mine] == bundle.bench(device="estimate:linux-x86")
    assert edgeship.bench(tiny_bundle, device="estimate:linux-x86") == bundle.bench(device="estimate:linux-x86")


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda bundle: bundle["onx"], "has nothing for onx; did you mean onnx?"),
        (lambda bundle: bundle["tflite"], "has nothing for tflite; known: onnx"),
        (lambda bundle: bundle["onnx"].open(adapter="a"), "runs a network, which has no adapters"),
        (lambda bundle: edgeship.load("nowhere"), "nowhere is not a bundle"),
        (lambda bundle: bundle.bench(device="moon"), 'no device "moon"'),
    ],
)
def test_what_is_not_there_gets_one_line(ask, says, tiny_bundle):
    with pytest.raises(EdgeshipError) as raised:
        ask(edgeship.load(tiny_bundle))
    assert says in str(raised.value)


def test_a_changed_file_is_not_opened(tiny_bundle, tmp_path):
    shutil.copytree(tiny_bundle, tmp_path / "b")
    bundle = edgeship.load(tmp_path / "b")
    path = bundle["onnx"].path
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ArtifactError, match=r"onnx/model\.onnx has changed"):
        bundle["onnx"].open()


class Texts(html.parser.HTMLParser):
    """Tags and texts of a page; only tags that are closed again are balanced."""

    def __init__(self):
        super().__init__()
        self.tags, self.open, self.text = set(), [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data + "\n"


def test_the_page_of_a_notebook_is_escaped_and_whole(tiny_bundle):
    """Names come from models of strangers: none of them becomes a tag."""
    report = edgeship.load(tiny_bundle).report
    row = report.rows[0]
    verdicts = tuple(
        dataclasses.replace(v, summary=HOSTILE, remark=HOSTILE, passed=False, fix=HOSTILE) for v in row.verdicts
    )
    hostile = dataclasses.replace(
        report, source=HOSTILE, targets=(HOSTILE,), profile=HOSTILE, notes=(HOSTILE,),
        rows=(dataclasses.replace(row, runtime=HOSTILE, file=HOSTILE, weights=HOSTILE, activations=HOSTILE, verdicts=verdicts),),
    )  # fmt: skip
    for shown, place in ((report, str(tiny_bundle)), (hostile, HOSTILE)):
        page = Texts()
        page.feed(report_html(shown, place))
        assert page.open == []
        assert page.tags <= {"div", "p", "b", "span", "table", "thead", "tbody", "tr", "th", "td"}
        assert len(report_html(shown, place)) < 10_000
    assert HOSTILE in page.text
    assert "src=" not in report_html(report, "x")
    shown = edgeship.load(tiny_bundle)._repr_html_()
    assert "passed" in shown
    assert str(tiny_bundle) in shown
