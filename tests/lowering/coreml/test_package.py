"""Packages: the same bytes from the same model, in this process and in another."""

import json

from edgeship.core.weights import Affine
from edgeship.passes.lower.torch_to_coreml import TorchToCoreML


def test_the_same_bytes(layers_program, with_encoded, lower, apple, tmp_path) -> None:
    program = with_encoded(layers_program, apple.decide_all(layers_program, Affine()))
    first = lower(program, TorchToCoreML())
    program.save(tmp_path / "program")
    assert apple.digests(first.path.parent) == apple.elsewhere(
        tmp_path / "program", tmp_path / "out", "coreml", "TorchToCoreML"
    )


def test_nothing_that_is_not_listed(layers_program, lower, apple) -> None:
    artifact = lower(layers_program, TorchToCoreML())
    manifest = json.loads((artifact.path / "Manifest.json").read_text())
    listed = {item["path"] for item in manifest["itemInfoEntries"].values()}
    assert listed == {"com.apple.CoreML/model.mlmodel", "com.apple.CoreML/weights"}
    assert manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"].endswith("model.mlmodel")
    assert {file for file in artifact.files if "debug" in file} == set()
    assert set(artifact.files) == set(apple.digests(artifact.path.parent))
