"""A bundle is whole or not there: every changed byte is found, writing is atomic, building twice gives the same."""

import json
import random
import shutil
import subprocess
from pathlib import Path

import jsonschema
import pytest

from edgeship.core.artifact import MANIFEST, Manifest, copy_file, file_digest, list_files
from edgeship.core.records import from_plain
from edgeship.errors import ArtifactError
from edgeship.shipping import bundle as module
from edgeship.shipping.bundle import changed_files, read_bundle, schema_path
from edgeship.shipping.schema import manifest_schema
from edgeship.shipping.swap import put_in_place


@pytest.fixture
def bundle(tiny_bundle, tmp_path) -> Path:
    place = tmp_path / "copy.edgeship"
    shutil.copytree(tiny_bundle, place)
    return place


def flip(path: Path, place: int, mask: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= mask
    path.write_bytes(content)


def refused(bundle: Path) -> bool:
    """Whether ``edgeship verify --no-run`` would end with an error, without the command around it."""
    try:
        return bool(changed_files(read_bundle(bundle)))
    except ArtifactError:
        return True


def test_the_bundle_holds_what_it_should(tiny_bundle):
    names = [path.relative_to(tiny_bundle).as_posix() for path in list_files(tiny_bundle)]
    assert names == [
        "inventory.json", "layers-onnx.svg", "manifest.json", "manifest.sha256", "onnx/model.onnx", "report.json",
    ]  # fmt: skip
    assert changed_files(read_bundle(tiny_bundle)) == []


def test_the_seal_is_what_sha256sum_reads(tiny_bundle):
    done = subprocess.run(["sha256sum", "-c", "manifest.sha256"], cwd=tiny_bundle, capture_output=True, check=False)
    assert done.returncode == 0


def test_the_manifest_says_everything(tiny_bundle):
    manifest = json.loads((tiny_bundle / MANIFEST).read_text())
    (artifact,) = manifest["artifacts"]
    (file,) = artifact["files"]
    assert file == {
        "path": "onnx/model.onnx",
        "sha256": file_digest(tiny_bundle / "onnx" / "model.onnx"),
        "bytes": (tiny_bundle / "onnx" / "model.onnx").stat().st_size,
    }
    (spec,) = artifact["signature"]["inputs"]
    assert (spec["name"], spec["dtype"], spec["shape"]) == ("image", "f32", [1, 1, 4, 4])
    assert {record["encoding"] for record in artifact["encodings"].values()} == {"int8 per channel"}
    assert "read back equal" in artifact["verified"]
    assert manifest["versions"].keys() >= {"edgeship", "torch", "onnx", "onnxruntime"}
    assert manifest["source"]["form"] == "torch"
    assert len(manifest["source"]["digest"]) == 64
    assert manifest["plan"]["steps"][0]["pass"] == "load/torch"


def test_every_changed_byte_is_found(bundle):
    chance = random.Random(7)
    for path in list_files(bundle):
        original = path.read_bytes()
        places = {0, len(original) - 1, *(chance.randrange(len(original)) for _ in range(40))}
        for place in places:
            flip(path, place, 1 << chance.randrange(8))
            assert refused(bundle), f"{path.name} byte {place}"
            path.write_bytes(original)
        path.write_bytes(original[:-1])
        assert refused(bundle), f"{path.name} cut"
        path.write_bytes(original + b"\n")
        assert refused(bundle), f"{path.name} grown"
        path.unlink()
        assert refused(bundle), f"{path.name} removed"
        path.write_bytes(original)
    assert not refused(bundle)


@pytest.mark.parametrize("name", ["onnx/model.onnx", "report.json", "manifest.json", "manifest.sha256"])
def test_the_command_says_what_has_changed(cli, bundle, name):
    place = bundle / name
    if name == "manifest.json":
        place.write_text(place.read_text().replace('"profile": "balanced"', '"profile": "balancad"'))
    else:
        flip(place, 3, 1)
    ran = cli("verify", bundle)
    assert ran.code == 8
    assert len(ran.errors) == 1
    assert name in ran.errors[0]
    assert "build it again" in ran.errors[0]
    plain = json.loads(cli("verify", bundle, "--json", "--no-run").out)
    assert plain["whole"] is False
    assert name in plain["problems"][0]


def test_a_manifest_made_anew_with_its_seal_must_still_fit(bundle, cli):
    """Whoever changes a file and its digests is found where the manifest no longer makes sense."""
    manifest = json.loads((bundle / MANIFEST).read_text())

    def written(change) -> int:
        data = json.loads(json.dumps(manifest))
        change(data)
        (bundle / MANIFEST).write_text(json.dumps(data))
        (bundle / "manifest.sha256").write_text(f"{file_digest(bundle / MANIFEST)}  manifest.json\n")
        ran = cli("verify", bundle, "--no-run")
        assert len(ran.errors) == (1 if ran.code else 0)
        return ran.code

    assert written(lambda data: None) == 0
    assert written(lambda data: data["artifacts"][0].update(main="../other/model.onnx")) == 8
    assert written(lambda data: data["artifacts"][0]["files"][0].update(path="../../etc/passwd")) == 8
    assert written(lambda data: data["artifacts"][0]["files"][0].update(path="/etc/passwd")) == 8
    assert written(lambda data: data.update(schema_version=99)) == 8
    assert written(lambda data: data.pop("artifacts")) == 8
    assert written(lambda data: data["artifacts"][0].update(surprise=1)) == 8
    assert written(lambda data: data["artifacts"][0]["signature"]["inputs"][0].update(dtype="f99")) == 8


@pytest.mark.parametrize("name", ["extra.txt", "onnx/extra.bin", ".hidden", "empty/"])
def test_what_was_added_is_found(bundle, name):
    path = bundle / name
    if name.endswith("/"):
        path.mkdir()
    else:
        path.write_text("more")
    assert changed_files(read_bundle(bundle)) == [f"{name.rstrip('/')} is not in the manifest"]


def test_a_link_is_no_file_of_a_bundle(bundle, tmp_path):
    real = bundle / "onnx" / "model.onnx"
    shutil.move(real, tmp_path / "elsewhere.onnx")
    real.symlink_to(tmp_path / "elsewhere.onnx")
    assert changed_files(read_bundle(bundle)) == ["onnx/model.onnx is a link"]


def test_an_artifact_that_no_longer_runs_is_found(bundle, cli):
    """Its bytes are as recorded, but the engine refuses them."""
    manifest = json.loads((bundle / MANIFEST).read_text())
    path = bundle / "onnx" / "model.onnx"
    path.write_bytes(path.read_bytes()[:-200])
    manifest["artifacts"][0]["files"][0] |= {"sha256": file_digest(path), "bytes": path.stat().st_size}
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    (bundle / "manifest.sha256").write_text(f"{file_digest(bundle / MANIFEST)}  manifest.json\n")
    assert cli("verify", bundle, "--no-run").code == 0
    ran = cli("verify", bundle)
    assert ran.code == 8
    assert "model.onnx" in ran.errors[0]


def test_the_published_schema_is_that_of_the_records():
    assert json.loads(schema_path().read_text()) == manifest_schema(), "run: python scripts/write_schema.py"
    jsonschema.Draft202012Validator.check_schema(manifest_schema())


def test_the_manifest_meets_its_schema_and_the_schema_can_fail(tiny_bundle):
    manifest = json.loads((tiny_bundle / MANIFEST).read_text())
    validator = jsonschema.Draft202012Validator(manifest_schema())
    assert list(validator.iter_errors(manifest)) == []
    for change in (
        lambda data: data.pop("profile"),
        lambda data: data["artifacts"][0].update(memory_bytes="much"),
        lambda data: data["artifacts"][0]["signature"]["inputs"][0].update(dtype="f99"),
        lambda data: data.update(extra=1),
    ):
        broken = json.loads(json.dumps(manifest))
        change(broken)
        assert list(validator.iter_errors(broken))
    assert from_plain(Manifest, manifest) == read_bundle(tiny_bundle).manifest


def accept(place: Path) -> None:
    """Whatever is there may go."""


def test_a_folder_is_put_in_place_of_another_in_one_step(tmp_path):
    new, old, aside = tmp_path / "new", tmp_path / "old", tmp_path / "aside"
    new.mkdir()
    (new / "file").write_text("new")
    put_in_place(new, old, aside, accept)
    assert (old / "file").read_text() == "new"
    newer = tmp_path / "newer"
    newer.mkdir()
    (newer / "file").write_text("newer")
    put_in_place(newer, old, aside, accept)
    assert (old / "file").read_text() == "newer"
    assert {path.name for path in tmp_path.iterdir()} == {"old", "aside"}
    assert (aside / "file").read_text() == "new"


def test_what_is_not_accepted_comes_back(tmp_path):
    new, old, aside = tmp_path / "new", tmp_path / "old", tmp_path / "aside"
    for folder in (new, old):
        folder.mkdir()
        (folder / "file").write_text(folder.name)

    def refuse(place: Path) -> None:
        assert (place / "file").read_text() == "old"
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        put_in_place(new, old, aside, refuse)
    assert (old / "file").read_text() == "old"
    assert (new / "file").read_text() == "new"
    assert not aside.exists()


def test_a_reader_sees_the_old_or_the_new_and_never_none(tmp_path):
    import threading

    final = tmp_path / "final"
    stop, seen, failures = threading.Event(), set(), []

    def put(number: int) -> None:
        ready = tmp_path / f"ready{number}"
        ready.mkdir()
        (ready / "file").write_text(str(number))
        put_in_place(ready, final, tmp_path / f"aside{number}", accept)

    put(0)

    def watch() -> None:
        while not stop.is_set():
            try:
                seen.add((final / "file").read_text())
            except OSError as error:
                failures.append(error)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for number in range(1, 200):
        put(number)
    stop.set()
    watcher.join()
    assert failures == []
    assert len(seen) > 1


def test_without_the_system_call_the_old_folder_is_moved_aside(tmp_path, monkeypatch):
    from edgeship.shipping import swap

    monkeypatch.setattr(swap, "_exchange", lambda one, other: False)
    for name, check in (
        ("one", test_a_folder_is_put_in_place_of_another_in_one_step),
        ("two", test_what_is_not_accepted_comes_back),
    ):
        (tmp_path / name).mkdir()
        check(tmp_path / name)


def test_a_linked_output_stays_a_link(cli, tiny_order, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "later").symlink_to("not_yet")
    for name in ("link", "link", "later"):
        ran = cli("build", *tiny_order, "-o", name)
        assert ran.code == 0, ran.err
        assert (tmp_path / name).is_symlink()
        assert cli("verify", name, "--no-run").code == 0


def test_a_build_that_fails_a_check_leaves_the_old_bundle(cli, tiny_order, tmp_path):
    assert cli("build", *tiny_order, "-o", "out").code == 0
    before = {path: path.read_bytes() for path in list_files(tmp_path / "out")}
    ran = cli("build", *tiny_order, "-o", "out", "--set", "check/verify.min_snr_db=199")
    assert ran.code == 1
    assert "check/verify fell short on onnx" in ran.errors[0]
    assert "nothing was published" in ran.errors[0]
    assert {path: path.read_bytes() for path in list_files(tmp_path / "out")} == before


@pytest.mark.parametrize("name", ["onnx/stray", "onnx/model.onnx", "report.json", "folder/"])
def test_what_somebody_put_into_a_bundle_or_changed_there_is_kept(cli, tiny_order, tiny_bundle, tmp_path, name):
    place = tmp_path / "out"
    shutil.copytree(tiny_bundle, place)
    if name.endswith("/"):
        (place / name).mkdir()
    else:
        (place / name).write_text("mine")
    before = {path: path.read_bytes() for path in list_files(place)}
    ran = cli("build", *tiny_order, "-o", "out")
    assert ran.code == 2
    assert name.rstrip("/") in ran.errors[0]
    assert "nothing was touched" in ran.errors[0]
    assert {path: path.read_bytes() for path in list_files(place)} == before
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_what_the_finder_leaves_is_in_nobodys_way(cli, tiny_order, tiny_bundle, tmp_path):
    shutil.copytree(tiny_bundle, tmp_path / "out")
    for name in (".DS_Store", "onnx/.DS_Store"):
        (tmp_path / "out" / name).write_bytes(b"\0\0\0\1Bud1\0")
    assert cli("verify", "out", "--no-run").code == 0
    assert cli("build", *tiny_order, "-o", "out").code == 0
    assert (tmp_path / "out" / ".DS_Store").read_bytes() == b"\0\0\0\1Bud1\0"
    assert cli("verify", "out", "--no-run").code == 0
    (tmp_path / "out" / ".DS_Store").write_text("mine")
    assert cli("verify", "out", "--no-run").code == 8
    assert cli("build", *tiny_order, "-o", "out").code == 2


def test_the_source_of_a_browser_extension_is_no_bundle(cli, tiny_order, tmp_path):
    place = tmp_path / "extension"
    place.mkdir()
    (place / MANIFEST).write_text('{"manifest_version": 3, "name": "mine", "version": "1.0"}')
    (place / "background.js").write_text("work of weeks")
    ran = cli("build", *tiny_order, "-o", "extension")
    assert ran.code == 2
    assert "not empty and not a bundle" in ran.errors[0]
    assert {path.name for path in list_files(place)} == {MANIFEST, "background.js"}
    assert {path.name for path in tmp_path.iterdir()} == {"extension"}


def flipped_in(names: set[str]):
    """The copying of files, with a bit of the first of those flipped on its way off the disk."""

    def copy(source: Path, target: Path) -> str:
        if source.name in names:
            names.discard(source.name)
            flip(source, source.stat().st_size // 2, 4)
        return copy_file(source, target)

    return copy


def test_bytes_that_were_not_verified_are_not_published(cli, tiny_order, tmp_path, monkeypatch):
    """A bit flips in the cache between check/verify and the copy: the step runs again, and the right bytes ship."""
    env = {"EDGESHIP_CACHE": str(tmp_path / "cache")}
    assert cli("build", *tiny_order, "-o", "right", env=env).code == 0
    monkeypatch.setattr(module, "copy_file", flipped_in({"model.onnx"}))
    ran = cli("build", *tiny_order, "-o", "out", env=env)
    assert ran.code == 0, ran.err
    assert "is no longer what the checks read" in (tmp_path / "out.log").read_text()
    right = (tmp_path / "right" / "onnx" / "model.onnx").read_bytes()
    assert (tmp_path / "out" / "onnx" / "model.onnx").read_bytes() == right


def test_who_flips_bits_each_time_gets_nothing_published(cli, tiny_order, tmp_path, monkeypatch):
    def copy(source: Path, target: Path) -> str:
        flip(source, 7, 1)
        return copy_file(source, target)

    monkeypatch.setattr(module, "copy_file", copy)
    ran = cli("build", *tiny_order, "-o", "out", env={"EDGESHIP_CACHE": str(tmp_path / "cache")})
    assert ran.code == 3
    assert "is no longer what the checks read; nothing was published" in ran.errors[0]
    assert not (tmp_path / "out").exists()
