"""Several inputs in one text, with commas between, as targets and runtimes are given."""

import pytest

from edgeship.data.specs import parse_inputs, spec_texts
from edgeship.errors import UsageError

CASES = [
    ("a:f32[1],b:f32[1]", ["a:f32[1]", "b:f32[1]"]),
    ("a:f32[1,3], b:i64[2]", ["a:f32[1,3]", "b:i64[2]"]),
    ("a:f32[1];b:f32[]", ["a:f32[1]", "b:f32[]"]),
    ("a:f32[1,3,4]", ["a:f32[1,3,4]"]),
    ("a:f32[1],", ["a:f32[1]"]),
    ("x.1:f32[1],onnx::y:0:f32[2]", ["x.1:f32[1]", "onnx::y:0:f32[2]"]),
    # A name with a comma in it stays one.
    ('"p[0], q":f32[2]', ['"p[0], q":f32[2]']),
    ("p[0],q:f32[2]", ["p[0],q:f32[2]"]),
]


@pytest.mark.parametrize(("text", "wanted"), CASES)
def test_a_text_is_as_many_inputs_as_it_names(text, wanted):
    found = [str(spec) for spec in parse_inputs([text])]
    assert found == [str(parse_inputs([item])[0]) for item in wanted]
    assert len(found) == len(wanted)
    assert [str(spec) for spec in parse_inputs(spec_texts(text))] == found


@pytest.mark.parametrize("text", ["a:f32[1],b:f33[1]", "a:f32[1],a:f32[1]"])
def test_what_is_no_list_of_inputs_is_refused(text):
    with pytest.raises(UsageError):
        parse_inputs([text])


def test_two_inputs_in_one_text_build(tmp_path, monkeypatch):
    import torch

    import edgeship

    class Sum(torch.nn.Module):
        def forward(self, a, b):
            return torch.relu(a - b)

    monkeypatch.chdir(tmp_path)
    plan = edgeship.plan(Sum().eval(), "a:f32[1,4],b:f32[1,4]", target="linux-x86", runtime="onnx")
    assert plan.steps
