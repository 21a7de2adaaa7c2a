"""compress/calibrate as a pass: planning, data, the record it leaves."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgeship.compression.calibrate import HEADROOM
from edgeship.compression.encode import Encoder
from edgeship.core.choice import Choice
from edgeship.core.inventory import Inventory, OpCost, WeightUse
from edgeship.core.model import Source, TensorSpec, TorchModel
from edgeship.core.passes import Context, Skip
from edgeship.core.profile import DataRef, Profile, Request
from edgeship.core.registry import profiles, targets
from edgeship.core.weights import Affine
from edgeship.data.batches import describe_data
from edgeship.engine.notes import notes_of
from edgeship.errors import DataError, UsageError
from edgeship.passes.compress.calibrate import CalibrateActivations
from edgeship.program.export import make_program
from edgeship.program.program import REMARK, TorchProgram, read_record


def request_for(runtime: str, profile: str = "balanced", calibration: DataRef | None = None) -> Request:
    source = Source(Path("model.py"), (), reference="model.py:f")  # type: ignore[arg-type]
    return Request(source, targets()["galaxy-s24"], runtime, profiles()[profile], calibration=calibration)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> TorchModel:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU6(), nn.Flatten(), nn.Linear(144, 3))
    program = make_program(net, [TensorSpec("image", "f32", (1, 1, 8, 8))], [torch.randn(1, 1, 8, 8)])
    folder = tmp_path_factory.mktemp("program")
    program.save(folder)
    return TorchModel(folder, program.signature)


def test_it_follows_the_profile() -> None:
    assert isinstance(CalibrateActivations.plan(request_for("onnx")), Skip)
    planned = CalibrateActivations.plan(request_for("qnn", calibration=DataRef("data.npz", "d")))
    assert planned == CalibrateActivations(16, "minmax", data=DataRef("data.npz", "d"), float_products=False)
    planned = CalibrateActivations.plan(request_for("onnx", "fast", DataRef("data.npz", "d")))
    assert planned == CalibrateActivations(8, "mse", data=DataRef("data.npz", "d"), quickest=True)


@pytest.mark.parametrize(
    ("runtime", "activations"), [("onnx", "dynamic"), ("tflite", "dynamic"), ("qnn", "int16"), ("coreml", "float")]
)
def test_without_data_there_are_no_static_8_bit_grids(runtime: str, activations: str) -> None:
    everywhere = Profile("w8a8", "x.", Choice("int8", "int8"))
    for data, wanted in ((None, activations), (DataRef("data.npz", "d"), "int8")):
        request = dataclasses.replace(request_for(runtime, calibration=data), profile=everywhere)
        assert request.choice == Choice("int8", wanted)  # type: ignore[arg-type]
        assert isinstance(CalibrateActivations.plan(request), Skip) == (wanted in ("float", "dynamic"))
        told = notes_of([request], [], [])
        assert ("give --calibration DATA" in "".join(told)) == (data is None)


@pytest.mark.parametrize(
    ("profile", "weights"), [("balanced", "int8"), ("fast", "int8"), ("auto", "auto"), ("small", "int4")]
)
def test_an_input_of_unknown_range_gets_no_static_grid_on_hexagon_without_data(profile: str, weights: str) -> None:
    halves = Choice("float16", "float")
    bounded = dataclasses.replace(request_for("qnn", profile), inventory=Inventory((), (), 0))
    unbounded = dataclasses.replace(bounded, unbounded=("x",))
    assert (bounded.choice.weights, bounded.choice.activations) == (weights, "int16")
    # Of a profile with fewer bits the size is what was asked for.
    assert unbounded.choice == (bounded.choice if profile == "small" else halves)
    assert isinstance(CalibrateActivations.plan(unbounded), Skip) == (profile != "small")
    for said in (
        {"calibration": DataRef("data.npz", "d")},
        {"options": {"compress/calibrate": {"samples": 9}}},
        {"options": {"compress/quantize": {"bits": 8}}},
    ):
        assert dataclasses.replace(unbounded, **said).choice.weights == weights  # type: ignore[arg-type]
    told = "".join(notes_of([unbounded], [], []))
    assert ("no range is known of x" in told and "give --calibration DATA" in told) == (profile != "small")


def test_auto_keeps_integers_where_halves_do_not_fit() -> None:
    inventory = Inventory((WeightUse("w", "linear", (100, 100)),), (), 0)
    request = dataclasses.replace(request_for("qnn", "auto"), inventory=inventory, unbounded=("x",))
    for most, wanted in ((20_000, "float16"), (19_999, "auto")):
        assert dataclasses.replace(request, max_size_bytes=most).choice.weights == wanted


class _Unlike(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 1)
        self.out.weight.data[:2] *= 1e4

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.conv(image)))


@pytest.mark.parametrize(
    ("float_products", "bits", "says"), [(True, 8, "1 of 4 activations stay in float"), (False, 16, "all have 16 bits")]
)
def test_what_a_grid_cannot_hold_is_in_float_or_in_16_bits_and_told(
    float_products: bool, bits: int, says: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    program = make_program(_Unlike().eval(), [TensorSpec("image", "f32", (1, 1, 8, 8))], [torch.randn(1, 1, 8, 8)])
    encoded, _ = Encoder(program, dict.fromkeys(("conv.weight", "out.weight"), Affine(8))).encode()
    record = dataclasses.replace(program.record, encodings=dict.fromkeys(encoded, Affine(8)))
    dataclasses.replace(program, encoded=encoded, record=record).save(tmp_path / "loaded")
    np.savez(tmp_path / "data.npz", image=np.random.default_rng(0).standard_normal((4, 1, 8, 8)).astype(np.float32))
    data = describe_data(str(tmp_path / "data.npz"))
    step = CalibrateActivations(8, "mse", data=data, float_products=float_products)
    made = read_record(step.run(TorchModel(tmp_path / "loaded", program.signature), Context(tmp_path)))
    assert {grid.bits for grid in made.activations.values()} == {bits}
    assert says in made.history[-1]
    assert made.history[-1].startswith(REMARK)


@pytest.mark.parametrize("quickest", [True, False])
def test_grids_for_speed_alone_are_left_where_much_of_the_arithmetic_has_none(quickest: bool, tmp_path: Path) -> None:
    """The second convolution answers on no grid, and has 16 of 20 products at each place."""
    torch.manual_seed(0)
    module = _Unlike()
    module.conv = nn.Conv2d(1, 4, 1)
    program = make_program(module.eval(), [TensorSpec("image", "f32", (1, 1, 8, 8))], [torch.randn(1, 1, 8, 8)])
    program.save(tmp_path / "loaded")
    np.savez(tmp_path / "data.npz", image=np.random.default_rng(0).standard_normal((4, 1, 8, 8)).astype(np.float32))
    step = CalibrateActivations(8, "mse", data=describe_data(str(tmp_path / "data.npz")), quickest=quickest)
    made = step.run(TorchModel(tmp_path / "loaded", program.signature), Context(tmp_path))
    step.ensures(made, model=made)
    record = read_record(made)
    assert bool(record.activations) != quickest
    assert ("have to, with 80% of the arithmetic" in record.history[-1]) == quickest


def test_only_a_profile_that_wants_the_quickest_gives_grids_up() -> None:
    inventory = Inventory(
        (WeightUse("w", "conv", (64, 64, 3, 3)),), (OpCost("n", "aten.conv2d", 10**9, 1, 1, ("w",)),), 0
    )
    for runtime, quickest in (("onnx", True), ("qnn", False)):
        request = dataclasses.replace(
            request_for(runtime, "fast"), inventory=inventory, calibration=DataRef("data.npz", "d")
        )
        step = CalibrateActivations.plan(request)
        assert isinstance(step, CalibrateActivations)
        assert (step.bits, step.quickest) == (8, quickest)


def test_a_model_that_no_grid_holds_stays_in_float_altogether(saved: TorchModel, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    image = random.standard_normal((6, 1, 8, 8)) * np.array([1, 1, 1, 1e-4, 1e-4, 1e-4]).reshape(6, 1, 1, 1)
    np.savez(tmp_path / "data.npz", image=image.astype(np.float32))
    torch.manual_seed(0)
    program = make_program(
        nn.Conv2d(1, 2, 3, bias=False), [TensorSpec("image", "f32", (1, 1, 8, 8))], [torch.randn(1, 1, 8, 8)]
    )
    program.save(tmp_path / "loaded")
    step = CalibrateActivations(8, "mse", data=describe_data(str(tmp_path / "data.npz")))
    made = step.run(TorchModel(tmp_path / "loaded", program.signature), Context(tmp_path))
    step.ensures(made, model=saved)
    assert not read_record(made).activations


def test_the_record_holds_grids_and_history(saved: TorchModel, tmp_path: Path) -> None:
    step = CalibrateActivations(8, "mse", samples=4)
    model = step.run(saved, Context(tmp_path))
    step.ensures(model, model=saved)
    record = read_record(model)
    assert set(record.activations) >= {"image", "linear"}
    assert "4 generated samples" in record.history[-1]
    assert not read_record(saved).activations
    with torch.no_grad():
        assert TorchProgram.open(model).module()(torch.randn(1, 1, 8, 8))[0].shape == (1, 3)


def test_it_uses_the_users_data(saved: TorchModel, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", image=np.full((3, 1, 8, 8), 7, np.float32))
    step = CalibrateActivations(16, "minmax", data=describe_data(str(tmp_path / "data.npz")))
    (tmp_path / "out").mkdir()
    record = read_record(step.run(saved, Context(tmp_path / "out")))
    assert record.activations["image"].scale * 32767 == pytest.approx(HEADROOM * 7, rel=1e-3)
    assert "3 samples" in record.history[-1]


def test_bad_data_is_one_clear_error(saved: TorchModel, tmp_path: Path) -> None:
    for name, array, message in (
        ("nan", np.full((2, 1, 8, 8), np.nan, np.float32), "NaN or infinity"),
        ("shape", np.zeros((2, 1, 9, 8), np.float32), "shape"),
        ("empty", np.zeros((0, 1, 8, 8), np.float32), "no samples"),
    ):
        np.savez(tmp_path / f"{name}.npz", image=array)
        step = CalibrateActivations(data=DataRef(str(tmp_path / f"{name}.npz"), "d"))
        with pytest.raises(DataError, match=message):
            step.run(saved, Context(tmp_path))
    with pytest.raises(UsageError, match="samples"):
        CalibrateActivations(samples=0).run(saved, Context(tmp_path))


def test_two_runs_write_the_same(saved: TorchModel, tmp_path: Path) -> None:
    written = []
    for name in "ab":
        (tmp_path / name).mkdir()
        model = CalibrateActivations(8, "mse", samples=3).run(saved, Context(tmp_path / name))
        written.append((model.path / "program.json").read_bytes())
    assert written[0] == written[1]
