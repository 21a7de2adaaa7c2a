"""compress/quantize as a pass: what it plans, and that each method stores what was asked for."""

import dataclasses

import numpy as np
import pytest

from edgeship.compression.encode import Encoder
from edgeship.core.choice import Choice
from edgeship.core.inventory import Inventory, WeightUse
from edgeship.core.passes import Context, Skip
from edgeship.core.planning import CALIBRATION_TOKENS
from edgeship.core.profile import Profile
from edgeship.core.weights import MXFP4, Affine, Float, Palette, Sparse
from edgeship.data.batches import describe_data
from edgeship.engine.planner import apply_options
from edgeship.errors import DataError, EncodingError, UsageError
from edgeship.passes.compress.prune import PruneWeights
from edgeship.passes.compress.quantize import QuantizeWeights
from edgeship.program.program import REMARK, TorchProgram, read_record


def run(step, model, folder):
    folder.mkdir(exist_ok=True)
    made = step.run(model, Context(folder))
    step.ensures(made, model=model)
    return TorchProgram.open(made)


def test_data_are_looked_at_where_they_are_given(request_for, calibration):
    assert QuantizeWeights.plan(request_for()).method == "nearest"
    assert QuantizeWeights.plan(request_for(calibration=calibration)).method == "gptq"
    finetuned = {"compress/finetune": {"steps": 1}}
    assert QuantizeWeights.plan(request_for(calibration=calibration, options=finetuned)).method == "nearest"
    assert QuantizeWeights.plan(request_for(profile="small")).method == "clipped"
    assert QuantizeWeights.plan(request_for(profile="small", calibration=calibration)).method == "gptq"
    trained = {"compress/finetune": {"steps": 1}}
    assert (
        QuantizeWeights.plan(request_for(profile="small", calibration=calibration, options=trained)).method == "clipped"
    )


def test_the_method_follows_the_bits_that_set_gives(request_for, calibration):
    fewer = {"compress/quantize": {"bits": 4}}
    assert QuantizeWeights.plan(request_for(calibration=calibration, options=fewer)).method == "gptq"
    integers = {"compress/quantize": {"form": "int", "bits": 4}}
    planned = QuantizeWeights.plan(request_for(profile="exact", calibration=calibration, options=integers))
    assert (planned.method, planned.data) == ("gptq", calibration)


@pytest.mark.parametrize(
    ("profile", "given", "says"),
    [
        ("exact", {"bits": 4}, "bits has no effect: weights are float16"),
        ("auto", {"group_size": 64}, "group_size has no effect: auto chooses them"),
        ("balanced", {"form": "auto"}, "form=auto allocates nothing"),
    ],
)
def test_options_without_effect_are_refused(profile, given, says, request_for):
    request = request_for(profile=profile, options={"compress/quantize": given})
    step = apply_options(QuantizeWeights.plan(request), given)
    with pytest.raises(UsageError, match=says):
        step.confirm(request)


def test_what_nothing_rounds_to_against_data_takes_none(request_for, calibration):
    """MXFP4 has blocks with a power of two: its exponents are chosen by the weights alone."""
    asked = {"encoding": "mxfp4"}
    request = request_for("coreai", profile="small", calibration=calibration, options={"compress/quantize": asked})
    step = apply_options(QuantizeWeights.plan(request), asked)
    assert (step.method, step.data, step.base) == ("clipped", None, MXFP4())
    step.confirm(request)
    with pytest.raises(UsageError, match="method=gptq does not round to mxfp4"):
        dataclasses.replace(step, method="gptq").confirm(request)


@pytest.mark.parametrize("words", [{"bits": 4}, {"form": "palette"}])
def test_a_name_and_words_of_an_encoding_are_not_given_together(request_for, words):
    asked = {"encoding": "int4-g32", **words}
    request = request_for(profile="small", options={"compress/quantize": asked})
    step = apply_options(QuantizeWeights.plan(request), asked)
    with pytest.raises(UsageError, match=f"{next(iter(words))} has no effect: weights are int4-g32"):
        step.confirm(request)


def test_without_data_convolutions_are_not_clipped(request_for):
    convolutions = Inventory((WeightUse("a", "conv", (16, 16, 3, 3)), WeightUse("b", "linear", (10, 16))), (), 1)
    assert QuantizeWeights.plan(request_for(profile="small", inventory=convolutions)).method == "nearest"


def test_the_profile_decides_the_form(request_for):
    assert QuantizeWeights.plan(request_for("coreml", "small")).base == Palette(4, 8)
    assert QuantizeWeights.plan(request_for("onnx", "small")).base == Affine(4, True, "group", 32)
    assert QuantizeWeights.plan(request_for("onnx", "exact")).base == Float(16)
    full = Profile("full", "x.", Choice("float32"))
    assert isinstance(QuantizeWeights.plan(dataclasses.replace(request_for(), profile=full)), Skip)


def test_what_a_runtime_cannot_hold_is_refused_while_planning(request_for):
    request = request_for("onnx")
    with pytest.raises(EncodingError, match="cannot hold palette4"):
        QuantizeWeights(form="palette", bits=4).confirm(request)


def test_methods_that_look_at_data_want_it(request_for):
    for step in (QuantizeWeights(bits=4, method="gptq"), QuantizeWeights(bits=8, bias_correction=True)):
        with pytest.raises(DataError, match="needs calibration data"):
            step.confirm(request_for())


@pytest.mark.parametrize("method", ["nearest", "clipped", "gptq", "awq"])
def test_every_method_stores_the_encoding_that_was_asked_for(method, saved, calibration, tmp_path):
    step = QuantizeWeights(bits=4, granularity="group", group_size=16, method=method, data=calibration, samples=16)
    program = run(step, saved, tmp_path / method)
    encodings = program.record.encodings
    assert encodings["6.weight"] == Affine(4, True, "group", 16)
    assert encodings["0.weight"] == Affine(4)
    assert set(program.encoded) == {"0.weight", "2.weight", "6.weight", "8.weight", "10.weight"}
    assert program.record.history[-1].endswith(method)


def test_gptq_costs_the_outputs_less_than_nearest(saved, calibration, tmp_path):
    images = np.load(calibration.reference)["image"]

    def noise(method):
        step = QuantizeWeights(bits=3, method=method, data=calibration)
        module = run(step, saved, tmp_path / method).module()
        plain = TorchProgram.open(saved).module()
        import torch

        pairs = [(plain(x)[0], module(x)[0]) for x in torch.from_numpy(images[:, None])]
        return sum(float((a - b).square().sum()) for a, b in pairs)

    assert noise("gptq") < 0.7 * noise("nearest")


def test_the_same_input_gives_the_same_bits(saved, calibration, tmp_path):
    step = QuantizeWeights(bits=4, method="gptq", data=calibration, samples=16)
    first, second = run(step, saved, tmp_path / "a"), run(step, saved, tmp_path / "b")
    for name, tensor in first.encoded.items():
        for role, array in tensor.arrays().items():
            assert np.array_equal(array, second.encoded[name].arrays()[role])


def test_bias_correction_keeps_the_mean_of_the_outputs(saved, calibration, tmp_path):
    import torch

    images = torch.from_numpy(np.load(calibration.reference)["image"][:, None])
    plain = TorchProgram.open(saved).module()
    means = {}
    for correct in (False, True):
        step = QuantizeWeights(bits=2, method="clipped", bias_correction=correct, data=calibration)
        module = run(step, saved, tmp_path / str(correct)).module()
        means[correct] = float(torch.stack([module(x)[0] - plain(x)[0] for x in images]).mean(0).abs().max())
    assert means[True] < 0.5 * means[False]


def test_raised_layers_get_the_encoding_of_the_gate(saved, tmp_path):
    program = run(
        QuantizeWeights(bits=2, raised=(("6.weight", "int8"), ("0.weight", "float16"))), saved, tmp_path / "x"
    )
    assert program.record.encodings["6.weight"] == Affine(8)
    assert program.record.encodings["0.weight"] == Float(16)
    assert program.record.encodings["8.weight"] == Affine(2)


def test_pruned_weights_lose_their_zeros_only_where_the_runtime_stores_them_so(saved, tmp_path):
    pruned = PruneWeights(sparsity=0.6).run(saved, Context(tmp_path))
    dense = run(QuantizeWeights(bits=8), pruned, tmp_path / "dense")
    sparse = run(QuantizeWeights(bits=8, sparse=("linear", "conv")), pruned, tmp_path / "sparse")
    assert {str(item) for item in dense.record.encodings.values()} == {"int8 per channel"}
    assert set(sparse.record.encodings.values()) == {Sparse(Affine(8))}
    for name, tensor in sparse.encoded.items():
        assert np.array_equal(tensor.dequantize(), dense.encoded[name].dequantize())
        assert tensor.sparsity == pytest.approx(0.6, abs=0.03)


def test_pruned_weights_stay_zero_through_gptq(saved, calibration, tmp_path):
    pruned = PruneWeights(sparsity=0.5).run(saved, Context(tmp_path))
    program = run(QuantizeWeights(bits=4, method="gptq", data=calibration, samples=16), pruned, tmp_path / "q")
    for name, share in read_record(pruned).pruned.items():
        zeros = float((program.encoded[name].dequantize() == 0).mean())
        assert zeros >= share - 1e-6
        kept = TorchProgram.open(pruned).weights[name].numpy() != 0
        assert not program.encoded[name].dequantize()[~kept].any()


@pytest.mark.parametrize("method", ["clipped", "gptq"])
def test_pruned_weights_in_a_dense_palette_lose_no_more_than_whole_ones(method, saved, calibration, tmp_path):
    pruned = PruneWeights(sparsity=0.1).run(saved, Context(tmp_path / "pruned"))
    step = QuantizeWeights(form="palette", bits=4, method=method, data=calibration, samples=16)
    program = run(step, pruned, tmp_path / "made")
    whole, made = program.weights["6.weight"].float().numpy(), program.encoded["6.weight"].dequantize()
    zeros = whole == 0
    assert zeros.mean() == pytest.approx(0.1, abs=0.01)
    # Near zero, as rounding leaves it: not at the lowest entry, nor at the smallest weight that was kept.
    assert np.sqrt(np.square(made[zeros]).mean()) <= 0.75 * np.diff(np.unique(made)).max()


@pytest.mark.parametrize(
    ("fields", "says"), [({"samples": 0}, "samples"), ({"group_size": -32}, "is not a group size")]
)
def test_numbers_that_say_nothing_are_refused(fields, says, request_for):
    with pytest.raises(UsageError, match=says):
        QuantizeWeights(**fields).confirm(request_for())


def test_what_the_user_keeps_is_kept_and_told(request_for, saved, tmp_path):
    step = QuantizeWeights.plan(request_for(keep=(("0.weight", "float16"), ("6.weight", "float32"))))
    step.confirm(request_for())
    program = run(step, saved, tmp_path / "kept")
    assert program.record.encodings["0.weight"] == Float(16)
    assert program.record.encodings["6.weight"] == Float(32)
    assert program.record.encodings["2.weight"] == Affine(8)
    assert (
        program.record.history[-1]
        == f"{REMARK}compress/quantize: kept as --keep says: 0.weight float16, 6.weight float32"
    )
    program = run(QuantizeWeights.plan(request_for(keep=(("0.weight", "int4-g7"),))), saved, tmp_path / "other")
    assert program.record.history[-1].endswith("as --keep says: 0.weight int4 (int4-g7 does not fit)")
    with pytest.raises(EncodingError, match="cannot hold"):
        QuantizeWeights.plan(request_for("qnn", keep=(("0.weight", "float16"),))).confirm(request_for("qnn"))


def test_weights_that_cost_the_outputs_most_get_more_bits(request_for, saved, tmp_path):
    step = QuantizeWeights.plan(request_for(profile="small"))
    assert step.floor_db > 0
    plain = run(dataclasses.replace(step, floor_db=0), saved, tmp_path / "plain")
    assert plain.record.losses == {}
    program = run(dataclasses.replace(step, floor_db=40), saved, tmp_path / "guarded")
    assert set(program.record.losses) == set(program.encoded)
    raised = [name for name, encoding in program.record.encodings.items() if encoding.bits == 8]
    assert raised
    assert all(name in program.record.history[-1] for name in raised[:5])
    assert QuantizeWeights.plan(request_for(profile="exact")).floor_db == 0
    assert QuantizeWeights.plan(request_for(options={"compress/finetune": {"steps": 1}})).floor_db == 0


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """40 windows of 32 tokens, of which check passes keep a fifth."""
    path = tmp_path_factory.mktemp("texts") / "ids.npz"
    np.savez(path, input_ids=np.random.default_rng(0).integers(0, 256, (40, 32)))
    return describe_data(str(path))


@pytest.mark.parametrize(
    ("options", "tokens", "minutes", "samples"),
    [
        ({}, CALIBRATION_TOKENS, None, 128),
        ({"tokens": 4096}, 4096, None, 128),
        ({"samples": 9}, None, None, 9),
        ({"minutes": 1.5}, None, 1.5, 128),
        ({"minutes": 3, "tokens": 5000}, 5000, 3.0, 128),
    ],
)
def test_texts_have_a_budget_of_tokens_or_of_time(options, tokens, minutes, samples, request_for, texts):
    source = dataclasses.replace(request_for().source, form="decoder")
    request = request_for(profile="small", calibration=texts, source=source, options={"compress/quantize": options})
    step = apply_options(QuantizeWeights.plan(request), options)
    step.confirm(request)
    assert (step.tokens, step.minutes, step.samples) == (tokens, minutes, samples)
    if not options:
        network = request_for(profile="small", calibration=texts)
        assert QuantizeWeights.plan(network).tokens is None
        assert QuantizeWeights.plan(dataclasses.replace(request, calibration=None)).tokens is None


@pytest.mark.parametrize(
    ("fields", "count"),
    [({"tokens": 160}, 5), ({"tokens": 31}, 1), ({"tokens": 1 << 30}, 32), ({"samples": 7}, 7), ({"minutes": 1e-9}, 1)],
)
def test_the_budget_is_kept_and_said_before_it_is_spent(fields, count, decoder_model, texts, tmp_path, monkeypatch):
    model = decoder_model("llama")
    seen, said, told = [], [], []

    def watched(self, batches, store):
        seen.extend(batches)
        said.append("encoding starts")
        return original(self, batches, store)

    original = Encoder.encode
    monkeypatch.setattr(Encoder, "encode", watched)
    step = QuantizeWeights(bits=4, granularity="group", method="gptq", data=texts, **fields)
    context = Context(tmp_path, progress=lambda done, total, what: told.append(what), say=said.append)
    made = TorchProgram.open(step.run(model, context))
    assert len(seen) == count
    assert len({batch["input_ids"].tobytes() for batch in seen}) == count
    # Of 40 windows the check passes keep 8; `samples` reads no more than it takes.
    given = 7 if "samples" in fields else 32
    assert said[1] == "encoding starts"
    assert said[0].startswith(f"calibration on {count * 32} of {given * 32} tokens given, about ")
    assert said[0].endswith("B of memory")
    remark = next(line for line in made.record.history if line.startswith(REMARK))
    assert remark.startswith(f"{REMARK}calibrated on {count * 32} of {given * 32} tokens given")
    assert ("left out" in remark) == (count < given)
    assert any(" left" in what for what in told)


@pytest.mark.parametrize("fields", [{"tokens": 0}, {"minutes": 0.0}, {"minutes": float("nan")}, {"minutes": -1.0}])
def test_budgets_that_buy_nothing_are_refused(fields, request_for, texts):
    request = request_for(profile="small", calibration=texts)
    step = dataclasses.replace(QuantizeWeights.plan(request), **fields)
    with pytest.raises(UsageError, match=f"compress/quantize.{next(iter(fields))}="):
        step.confirm(request)
