"""Sizes against limits: by how much it is too large, and which profile would fit."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from edgeship.core.choice import Choice
from edgeship.core.decoder import AttentionLayer, Decoder, FixedState, LanguageFacts, context_of
from edgeship.core.inventory import Inventory, OpCost, WeightUse
from edgeship.core.memory import predict
from edgeship.core.model import OnnxModel, Signature, Source, TorchModel
from edgeship.core.passes import Context
from edgeship.core.profile import Request
from edgeship.core.records import write_json
from edgeship.core.registry import profiles, runtimes, targets
from edgeship.core.weights import ActivationEncoding, Affine, Float
from edgeship.errors import UsageError
from edgeship.passes.check.size import CheckSize
from edgeship.program.program import ProgramRecord

MILLION = 10**6
INVENTORY = Inventory(
    (WeightUse("w", "linear", (1000, 1000)), WeightUse("b", "other", (1000,))),
    (OpCost("l", "linear", MILLION, 1000, 1000, ("w", "b")),), 5000,
)  # fmt: skip
OTHERS = {"exact": Choice("float16", "float"), "tiny": Choice("int8", "dynamic")}


def decided(encodings, activations=None, aliases=None) -> ProgramRecord:
    return ProgramRecord(Signature((), ()), INVENTORY, encodings, activations or {}, aliases or {})


@pytest.fixture
def check(tmp_path):
    folder = tmp_path / "program"
    folder.mkdir()
    (tmp_path / "model.onnx").write_bytes(b"0" * 2 * MILLION)

    def go(record=None, **options):
        write_json(folder / "program.json", record or decided({"w": Float(16)}))
        artifact = OnnxModel(tmp_path / "model.onnx", Signature((), ()), language=options.pop("language", None))
        choice = options.pop("choice", Choice("float16", "float"))
        task = CheckSize("onnx", "pixel8", options.pop("limit_bytes", 10**9), choice=choice, profiles=OTHERS, **options)
        return task.run(artifact, TorchModel(folder, Signature((), ())), Context(tmp_path))

    return go


def test_a_model_that_fits(check):
    verdict = check()
    assert verdict.passed
    assert verdict.summary.startswith("2 MB on disk, about ")
    assert verdict.measurement("file_bytes").value == 2 * MILLION
    assert verdict.measurement("file_bytes").how == "measured"
    assert verdict.measurement("memory_bytes").how == "estimated"


def test_too_large_a_file_says_by_how_much_and_what_fits(check):
    verdict = check(max_size_bytes=1_500_000)
    assert not verdict.passed
    assert "is 2 MB, 500 kB over --max-size 1.5 MB" in verdict.summary
    assert verdict.fix == "--profile tiny would fit"


def test_too_much_memory_says_what_the_device_allows(check):
    verdict = check(limit_bytes=20 * MILLION)
    assert not verdict.passed
    assert "of memory, pixel8 allows 20 MB" in verdict.summary
    assert "no profile fits; the smallest makes about 1." in verdict.fix


@pytest.mark.parametrize(
    ("encoding", "resident"),
    [(Float(16), 32), (Affine(8), 32), (Affine(4, True, "group", 8), 4)],
)
def test_memory_is_that_of_the_encodings_that_were_decided(check, encoding, resident):
    """Not of the profile's: ``--set compress/quantize.bits=4`` must show."""
    assert runtimes()["onnx"].resident_bits("linear", encoding, "float") == resident
    verdict = check(decided({"w": encoding}), choice=Choice("float16", "float"))
    assert verdict.measurement("memory_weights").value == resident * MILLION // 8 + 4 * 1000


def test_memory_counts_the_grids_that_were_decided(check):
    grids = {"l": ActivationEncoding(8, 0.1, 0)}
    for record, expected in ((decided({}), 20_000), (decided({}, grids), 5_000)):
        assert check(record).measurement("memory_activations").value == expected


def test_a_tied_weight_counts_once(check):
    bias = check(decided({}, aliases={"w": "b"})).measurement("memory_weights").value
    assert bias == 4 * 1000


def test_memory_counts_weights_activations_and_the_engine():
    for runtime in runtimes().values():
        found = predict(INVENTORY, runtime, Choice("float16", "float"))
        assert found.memory == found.weights + found.activations + found.runtime
        assert found.runtime == runtime.engine.overhead_bytes
        assert found.activations in (5000 * 2, 5000 * 4)
        assert found.stored >= 2 * MILLION
        assert found.weights >= found.stored * 0.99


@pytest.mark.parametrize(
    ("choice", "stored"),
    [
        (Choice("float32", "float"), 4 * (MILLION + 1000)),
        (Choice("float16", "float"), 2 * MILLION + 4 * 1000),
        (Choice("int8", "float"), MILLION + 2 * 1000 + 4 * 1000),
    ],
)
def test_stored_bytes_by_hand(choice, stored):
    assert predict(INVENTORY, runtimes()["onnx"], choice).stored == stored


def test_tables_of_rows_have_an_encoding_of_their_own():
    table = Inventory((WeightUse("t", "embedding", (1000, 1000)),), (), 0)
    choice = Choice("float16", "float", embeddings="int8")
    assert predict(table, runtimes()["onnx"], choice).stored == MILLION + 2 * 1000


@pytest.mark.parametrize(("kept", "each"), [("float32", 4), ("float16", 2), ("int8", 1)])
def test_a_cache_is_counted_as_the_artifact_keeps_it(check, kept, each):
    decoder = Decoder("llama", (AttentionLayer(4, 2, 16), AttentionLayer(4, 2, 24, 12)), 64, 256, 4096)
    verdict = check(decoder=decoder, context=1000, language=LanguageFacts(1000, kept), limit_bytes=200 * MILLION)
    cache = 2 * 2 * (16 + 24) * 1000 * each
    assert verdict.measurement("memory_cache").value == cache
    whole = sum(verdict.measurement(f"memory_{part}").value for part in ("weights", "activations", "cache"))
    assert verdict.measurement("memory_bytes").value == whole + runtimes()["onnx"].engine.overhead_bytes
    assert f"for 1000 positions in {kept}" in verdict.summary
    # Each position more takes as many bytes.
    limit = whole + runtimes()["onnx"].engine.overhead_bytes + cache // 10
    tight = check(decoder=decoder, context=1000, language=LanguageFacts(1000, kept), limit_bytes=limit)
    assert tight.measurement("longest_context").value == 1100


@pytest.mark.parametrize(
    ("runtime", "weights", "kept"),
    [
        ("genai", "int8", "float32"), ("litert-lm", "float16", "float32"), ("qnn-lm", "int8", "float32"),
        ("coreml-lm", "float16", "float16"), ("coreai-lm", "int8", "float16"), ("coreai-lm", "float32", "float32"),
    ],
)  # fmt: skip
def test_each_engine_has_a_cache_of_its_own(runtime, weights, kept):
    assert runtimes()[runtime].cache_of(None, Choice(weights)) == kept
    assert runtimes()[runtime].cache_of(kept, Choice(weights)) == kept


@pytest.mark.parametrize(
    ("runtime", "asked", "able"),
    [
        ("genai", "float16", "float32 or int8"), ("litert-lm", "int8", "float32"), ("qnn-lm", "int8", "float32"),
        ("coreml-lm", "float32", "float16"), ("coreai-lm", "int8", "float16 or float32"),
    ],
)  # fmt: skip
def test_an_engine_refuses_a_cache_that_it_cannot_keep(runtime, asked, able):
    with pytest.raises(UsageError, match=f"keeps keys and values in {able}, not in {asked}"):
        runtimes()[runtime].cache_of(asked, Choice("float16"))


def test_narrower_activations_take_less():
    runtime = runtimes()["onnx"]
    wide, narrow = (predict(INVENTORY, runtime, Choice("int8", mode)).activations for mode in ("int16", "int8"))
    assert (wide, narrow) == (10_000, 5_000)


TABLE = Inventory(
    (WeightUse("w", "linear", (1000, 1000)), WeightUse("t", "linear", (1000, 1000), looked_up=True)), (), 0
)


@pytest.mark.parametrize(
    ("engine", "choice", "layer", "table"),
    [
        # LiteRT-LM: the file's pages, the kernels' float32, and a float32 copy in each of three signatures.
        ("litert-lm", Choice("float16", "float"), 2 + 4 + 12, 2 + 4 + 12 + 4),
        # Of integers the kernels' float32 is in each signature too: the weight cache keeps constants.
        ("litert-lm", Choice("int8", "float"), 1 + 12 + 12, 1 + 12 + 12),
        ("litert-lm", Choice("int8", "dynamic"), 1 + 1, 1 + 1),
        ("litert-lm", Choice("float32", "float"), 4 + 4, 4 + 4),
        # onnxruntime-genai: a table beside the head's packed weights, where both are float.
        ("genai", Choice("float16", "float"), 4, 8),
        ("genai", Choice("int4-g32", "dynamic"), 0.5, 0.5),
    ],
)
def test_a_language_engines_copies_are_counted(engine, choice, layer, table):
    assert predict(TABLE, runtimes()[engine], choice).weights == int((layer + table) * MILLION)


@pytest.mark.parametrize(("engine", "copies"), [("genai", 1), ("litert-lm", 2), ("coreml-lm", 1)])
def test_caches_that_are_read_and_written_count_twice(engine, copies, tmp_path):
    decoder = Decoder("llama", (AttentionLayer(4, 2, 16),), 64, 256, 4096)
    task = CheckSize(engine, "pixel8", 10**9, decoder=decoder, context=1000, cache="float32")
    assert task._cache_bytes("float32") == copies * 2 * 2 * 16 * 4 * 1000


def order(limit, profile="exact", layers=2, **fields) -> Request:
    """A decoder of a million weights on a device where an app gets ``limit`` bytes."""
    decoder = Decoder("llama", (AttentionLayer(4, 2, 16),) * layers, 64, 256, 4096)
    target = targets()["pixel8"]
    target = replace(target, app_memory_bytes=replace(target.app_memory_bytes, value=limit))
    source = Source(Path("folder"), Signature((), ()), reference="folder", form="decoder")
    return Request(source, target, "genai", profiles()[profile], INVENTORY, decoder=decoder, **fields)


def proposed(request: Request) -> str:
    """The way out of a request that is refused; empty when it is not."""
    try:
        CheckSize.plan(request).confirm(request)
    except UsageError as error:
        return error.fix
    return ""


@pytest.mark.parametrize("profile", ["exact", "small", "balanced"])
@pytest.mark.parametrize("layers", [2, 24, 200])
@pytest.mark.parametrize("limit", [61, 64, 66, 67, 68, 71, 80, 100, 400])
def test_a_context_that_is_proposed_is_taken_and_leaves_the_room_that_is_asked_for(profile, layers, limit):
    request = order(limit * MILLION, profile, layers, context=4096)
    fix = proposed(request)
    if not fix:
        return
    found = re.fullmatch(r"(?:--profile (\w+) )?--context (\d+) would fit", fix)
    if found is None:
        assert fix == "choose a smaller model, or a larger target"
        # Nor would the fewest positions do, with any profile.
        fewest = [replace(request, context=2, profile=other) for other in (profiles()[profile], profiles()["small"])]
        task = [CheckSize.plan(item) for item in fewest]
        needs = [
            predict(INVENTORY, runtimes()["genai"], item.choice).memory + item._cache_bytes(item.cache) for item in task
        ]
        assert min(1.1 * need for need in needs) > limit * MILLION
        return
    changed = replace(request, context=int(found[2]), profile=profiles()[found[1] or profile])
    assert proposed(changed) == ""
    task = CheckSize.plan(changed)
    needs = predict(INVENTORY, runtimes()["genai"], task.choice)
    assert needs.memory + task._cache_bytes(task.cache) <= limit * MILLION
    assert context_of(request.decoder, int(found[2])) == int(found[2])


def test_one_more_position_than_is_proposed_is_too_many():
    request = order(100 * MILLION, "exact", 200, context=4096)
    longest = int(re.search(r"--context (\d+)", proposed(request))[1])
    needs = predict(INVENTORY, runtimes()["genai"], CheckSize.plan(request).choice)
    each = 200 * 2 * 2 * 16 * 4
    assert 1.1 * needs.memory + each * longest <= 100 * MILLION < 1.1 * needs.memory + each * (longest + 1)


def test_a_profile_is_proposed_with_what_the_file_holds_besides_weights(check, tmp_path):
    """Weights alone would fit; with the graph, which is in every file, they do not."""
    (tmp_path / "model.onnx").write_bytes(b"0" * 3 * MILLION)
    graph = 3 * MILLION - predict(INVENTORY, runtimes()["onnx"], OTHERS["exact"]).stored
    tiny = predict(INVENTORY, runtimes()["onnx"], OTHERS["tiny"]).stored
    (tmp_path / "model.onnx").write_bytes(b"0" * 3 * MILLION)
    fits, short = check(max_size_bytes=tiny + graph), check(max_size_bytes=tiny + graph - 1)
    assert fits.fix == "--profile tiny would fit" or "no profile fits" in fits.fix
    assert "no profile fits" in short.fix


def test_a_shorter_context_is_not_proposed_for_a_file_that_is_too_large(check):
    decoder = Decoder("llama", (AttentionLayer(4, 2, 16),) * 500, 64, 256, 4096)
    language = LanguageFacts(4000, "float32")
    both = check(decoder=decoder, context=4000, language=language, limit_bytes=100 * MILLION, max_size_bytes=1000)
    assert "--context" not in both.fix
    memory = check(decoder=decoder, context=4000, language=language, limit_bytes=100 * MILLION)
    longest = int(re.match(r"--context (\d+) ", memory.fix)[1])
    again = check(
        decoder=decoder, context=longest, language=LanguageFacts(longest, "float32"), limit_bytes=100 * MILLION
    )
    assert again.passed


def test_a_profile_that_the_runtime_cannot_store_is_not_proposed(monkeypatch):
    runtime = runtimes()["genai"]
    every = CheckSize.plan(order(10**9)).profiles
    assert "small" in every
    monkeypatch.setattr(
        type(runtime), "holds", lambda self, op, encoding, activations: "no" if encoding.bits < 8 else ""
    )
    left = CheckSize.plan(order(10**9)).profiles
    assert "small" not in left
    assert "balanced" in left


@pytest.mark.parametrize("layers", [0, 4])
def test_states_of_fixed_size_take_no_more_by_longer_texts(layers, check):
    state = FixedState("recurrent", 0, 0, (1, 1000, 1000))
    decoder = Decoder("hybrid", (AttentionLayer(4, 2, 16),) * layers, 64, 256, 4096, states=(state,))
    facts = {"decoder": decoder, "context": 100, "language": LanguageFacts(100, "float32")}
    plain = check(**facts).measurement("memory_bytes").value
    assert check(**facts).measurement("memory_cache").value == 4 * MILLION + layers * 2 * 2 * 16 * 4 * 100
    assert check(**facts, limit_bytes=plain).measurement("longest_context").value == (100 if layers else 4096)
    assert check(**facts, limit_bytes=plain - 1).measurement("longest_context").value == (99 if layers else 0)
