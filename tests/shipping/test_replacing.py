"""Nothing is lost: a bundle is replaced only when every file in it is what edgeship wrote, byte for byte."""

import errno
import gc
import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from killing import Killed, deadly

from edgeship.core.artifact import MANIFEST, SEAL, file_digest
from edgeship.core.owned import LINE, MARKER, claim, make
from edgeship.errors import EdgeshipError, OutputError, UsageError
from edgeship.shipping import replacing, swap
from edgeship.shipping.bundle import check_output
from edgeship.shipping.replacing import drafted, remove_leftovers

FILES = {"onnx/model.onnx": b"weights", "report.json": b"{}", "tokenizer/deep/vocab.txt": b"a b c"}
DESKTOP = b"\0\0\0\1Bud1 rest"


def write_bundle(place: Path, files: dict[str, bytes]) -> None:
    """A bundle as `publish` writes one, as far as its proof goes."""
    for name, content in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)
    records = [{"path": name, "sha256": file_digest(place / name), "bytes": len(files[name])} for name in files]
    plain = {"edgeship": "0", "schema_version": 1, "artifacts": [{"files": records[:1]}], "files": records[1:]}
    (place / MANIFEST).write_text(json.dumps(plain))
    (place / SEAL).write_text(f"{file_digest(place / MANIFEST)}  {MANIFEST}\n")


def publish(output: Path, files: dict[str, bytes] = FILES) -> None:
    check_output(output)
    remove_leftovers(output)
    with drafted(output) as draft:
        draft.ready.mkdir()
        write_bundle(draft.ready, files)
        draft.publish(output)


def tree(folder: Path) -> dict[str, object]:
    """Everything below a folder: bytes of files, targets of links, None for folders."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = ("link", os.readlink(path))
        else:
            found[name] = None if path.is_dir() else path.read_bytes()
    return found


def test_an_own_bundle_is_replaced_whole(tmp_path):
    output = tmp_path / "out"
    publish(output)
    publish(output, {"a/b": b"new"})
    assert tree(output).keys() == {"a", "a/b", MANIFEST, SEAL}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


names = st.sampled_from(
    [MANIFEST, SEAL, "notes.txt", "onnx/model.onnx", "onnx/model.onnx.data", "onnx/mine/a.txt", "report.json", MARKER,
     ".git/config", "tokenizer/deep/vocab.txt", "src", "empty/", ".DS_Store", "Report.json", "onnx/.DS_Store"]
)  # fmt: skip
contents = st.sampled_from(
    [b"", b"{}", b"weights", b"mine", LINE, b'{"manifest_version": 3, "name": "extension"}', DESKTOP]
)
foreign = st.dictionaries(names, contents | st.just("link"), min_size=1, max_size=4)


def put(place: Path, files: dict[str, object], elsewhere: Path) -> None:
    for name, content in files.items():
        with suppress(FileExistsError, NotADirectoryError, IsADirectoryError):
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            if name.endswith("/"):
                (place / name).mkdir(exist_ok=True)
            elif content == "link":
                (place / name).unlink(missing_ok=True)
                (place / name).symlink_to(elsewhere)
            else:
                (place / name).write_bytes(content)


@settings(max_examples=150, deadline=None)
@given(files=foreign, on_bundle=st.booleans(), late=st.booleans(), exchange=st.booleans())
def test_no_file_of_others_is_lost(tmp_path_factory, files, on_bundle, late, exchange):
    """Whatever lies in the output, before the build or at the last moment: refused with nothing changed, or only what
    is ours, to the byte, has gone."""
    base = tmp_path_factory.mktemp("case")
    output, elsewhere = base / "out", base / "elsewhere"
    output.mkdir()
    elsewhere.write_bytes(b"theirs")
    if on_bundle:
        write_bundle(output, FILES)
    original = tree(output)
    real = swap._exchange

    def exchanged(one: Path, other: Path) -> bool:
        if late and not exchanged.done:
            exchanged.done = True
            put(output, files, elsewhere)
            exchanged.before = tree(output)
        return real(one, other) if exchange else False

    exchanged.done = False
    if not late:
        put(output, files, elsewhere)
    exchanged.before = tree(output)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(swap, "_exchange", exchanged)
        try:
            publish(output, {"new.bin": b"new"})
            refused = False
        except EdgeshipError as error:
            refused = True
            assert isinstance(error, UsageError)
            assert len(str(error)) < 400
    before = exchanged.before
    assert elsewhere.read_bytes() == b"theirs"
    if refused:
        assert tree(output) == before
    else:
        theirs = {name: content for name, content in before.items() if original.get(name, 0) != content}
        whole = on_bundle and all(content in (DESKTOP, None) for content in theirs.values())
        assert whole or not before
        kept = {name: content for name, content in theirs.items() if content == DESKTOP and (output / name).is_file()}
        assert tree(output) == {"new.bin": b"new", MANIFEST: tree(output)[MANIFEST], SEAL: tree(output)[SEAL], **kept}
    assert {path.name for path in base.iterdir()} == {"out", "elsewhere"}
    shutil.rmtree(base)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("notes.txt", "holds notes.txt, which edgeship did not write"),
        ("onnx/mine.bin", "holds onnx/mine.bin, which edgeship did not write"),
        ("onnx/model.onnx", "holds onnx/model.onnx, which was changed since edgeship wrote it"),
    ],
)
def test_what_is_in_the_way_is_named(tmp_path, name, says):
    publish(tmp_path / "out")
    (tmp_path / "out" / name).write_bytes(b"mine")
    with pytest.raises(UsageError, match="nothing was touched") as raised:
        check_output(tmp_path / "out")
    assert says in str(raised.value)


def test_a_manifest_of_others_is_no_bundle(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / MANIFEST).write_text('{"manifest_version": 3}')
    (tmp_path / "out" / "background.js").write_text("theirs")
    with pytest.raises(UsageError, match="not empty and not a bundle that edgeship wrote"):
        check_output(tmp_path / "out")


def test_a_seal_around_paths_outside_removes_nothing_there(tmp_path):
    """A manifest with its seal, whose paths lead out of the folder."""
    (tmp_path / "theirs.txt").write_bytes(b"theirs")
    output = tmp_path / "out"
    output.mkdir()
    write_bundle(output, {"a": b"a"})
    plain = json.loads((output / MANIFEST).read_text())
    digest = file_digest(tmp_path / "theirs.txt")
    plain["files"] = [{"path": path, "sha256": digest} for path in ("../theirs.txt", str(tmp_path / "theirs.txt"))]
    (output / MANIFEST).write_text(json.dumps(plain))
    (output / SEAL).write_text(f"{file_digest(output / MANIFEST)}  {MANIFEST}\n")
    publish(output)
    assert (tmp_path / "theirs.txt").read_bytes() == b"theirs"


def test_other_names_of_our_files_stay(tmp_path):
    publish(tmp_path / "out")
    os.link(tmp_path / "out" / "onnx" / "model.onnx", tmp_path / "kept.onnx")
    publish(tmp_path / "out", {"new": b"new"})
    assert (tmp_path / "kept.onnx").read_bytes() == FILES["onnx/model.onnx"]


@pytest.mark.parametrize("what", ["mount", "bind"])
def test_a_mounted_disk_is_refused_before_any_work(tmp_path, what):
    output, other = tmp_path / "out put", tmp_path / "other"
    output.mkdir()
    other.mkdir()
    how = ["-t", "tmpfs", "none"] if what == "mount" else ["--bind", str(other)]
    mounted = subprocess.run(["mount", *how, str(output)], capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        with pytest.raises(UsageError, match="is a disk of its own"):
            check_output(output)
        publish(output / "inside")
    finally:
        subprocess.run(["umount", str(output)], check=True)


def test_places_that_hold_what_the_build_needs_are_refused(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for output in (Path(), Path("/"), Path(".."), tmp_path):
        with pytest.raises(UsageError, match="holds the current folder"):
            check_output(output)
    with pytest.raises(UsageError, match="holds the cache"):
        check_output(tmp_path / "out", tmp_path / "out" / "cache")
    with pytest.raises(UsageError, match="holds the source"):
        check_output(tmp_path / "out", None, tmp_path / "out" / "onnx" / "model.onnx")
    publish(tmp_path / "bundle")
    for output in (tmp_path / "bundle" / "onnx", tmp_path / "bundle" / "new" / "deep"):
        with pytest.raises(UsageError, match="lies in the bundle"):
            check_output(output)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UsageError, match="is not a path"):
        check_output(tmp_path / "loop")


def test_the_source_in_an_own_bundle_is_refused(cli, tiny_bundle, tmp_path):
    """Its float original would be gone: the artifact is ours, but it is also all that the user may have."""
    shutil.copytree(tiny_bundle, tmp_path / "out")
    source = tmp_path / "out" / "onnx" / "model.onnx"
    before = source.read_bytes()
    ran = cli("build", source, "--target", "linux-x86", "-o", "out")
    assert ran.code == 2
    assert "holds the source" in ran.errors[0]
    assert source.read_bytes() == before


def lasting(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize(
    "name", [".out.old-2024", ".out.draft-mine", ".out.draft-abcdefgh", ".out.probe-1", ".out.draft-99999999"]
)
@pytest.mark.parametrize("marker", [None, b"", b"mine\n", LINE + b"and more"])
def test_folders_that_are_named_like_drafts_stay(tmp_path, name, marker):
    folder = lasting(tmp_path / name, {"file": b"theirs", "bundle/file": b"theirs", "old/file": b"theirs"})
    if marker is not None:
        (folder / MARKER).write_bytes(marker)
    before = tree(tmp_path)
    remove_leftovers(tmp_path / "out")
    publish(tmp_path / "out")
    assert {name: content for name, content in tree(tmp_path).items() if not name.startswith("out")} == before


def test_a_dead_draft_goes_and_one_in_use_stays(tmp_path):
    output = tmp_path / "out"
    dead, held = make(tmp_path, ".out.draft-")
    lasting(dead / "bundle", {"half": b"ours"})
    held.release()
    living, kept = make(tmp_path, ".out.draft-")
    lasting(living / "bundle", {"half": b"ours"})
    another, other = make(tmp_path, ".out.draft-x.draft-")
    other.release()
    remove_leftovers(output)
    assert {path.name for path in tmp_path.iterdir()} == {living.name, another.name}
    kept.release()
    remove_leftovers(output)
    assert [path.name for path in tmp_path.iterdir()] == [another.name]


def test_a_bundle_that_a_killed_build_had_moved_aside_comes_back(tmp_path):
    """Between the two renames of a system without an exchange."""
    draft, held = make(tmp_path, ".out.draft-")
    for name, files in (("old", FILES), ("bundle", {"new": b"new"})):
        (draft / name).mkdir()
        write_bundle(draft / name, files)
    held.release()
    remove_leftovers(tmp_path / "out")
    assert (tmp_path / "out" / "onnx" / "model.onnx").read_bytes() == b"weights"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_not_ours_in_a_dead_draft_stays(tmp_path):
    """A build was killed after the exchange, when somebody had just saved a file into the old bundle."""
    publish(tmp_path / "out")
    draft, held = make(tmp_path, ".out.draft-")
    (draft / "bundle").mkdir()
    write_bundle(draft / "bundle", FILES)
    (draft / "bundle" / "notes.txt").write_bytes(b"theirs")
    held.release()
    for _ in range(2):
        remove_leftovers(tmp_path / "out")
        assert (draft / "bundle" / "notes.txt").read_bytes() == b"theirs"
        assert not (draft / "bundle" / "onnx").exists()


def test_something_at_the_place_of_a_first_bundle_stays(tmp_path):
    output = tmp_path / "out"
    with drafted(output) as draft:
        draft.ready.mkdir()
        write_bundle(draft.ready, FILES)
        output.write_bytes(b"theirs")
        with pytest.raises(UsageError, match="is a file"):
            draft.publish(output)
    assert output.read_bytes() == b"theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_cache_entry_is_no_output(tmp_path):
    (tmp_path / "out").mkdir()
    claim(tmp_path / "out", alone=False)
    with pytest.raises(UsageError, match="a folder of edgeship's cache"):
        check_output(tmp_path / "out")


def test_long_and_odd_names(tmp_path):
    for name in ("x" * 240, "a[b]*?", "ü" * 100, "two words\n"):
        publish(tmp_path / name)
        publish(tmp_path / name, {"new": b"new"})
        assert (tmp_path / name / "new").read_bytes() == b"new"
    assert len(list(tmp_path.iterdir())) == 4


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        check_output(tmp_path / "file" / "out")


def test_builds_that_publish_at_once_replace_each_other(tmp_path):
    import threading

    output, failures = tmp_path / "out", []

    def work(number: int) -> None:
        try:
            for turn in range(8):
                publish(output, {f"{number}.bin": bytes(1000 + turn)})
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert replacing.holdings(output).strange == ()


@pytest.mark.usefixtures("frozen")
@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize(
    "first", [0, pytest.param(1, marks=pytest.mark.heavy), pytest.param(2, marks=pytest.mark.heavy)]
)
def test_killed_at_every_moment(tmp_path, exchange, first):
    """The next build finds the old bundle or the new one, whole, and nothing beside it; what is not ours stays."""
    new, moment, done = {"new.bin": b"new", "deep/er/file": b"x"}, first, False
    seen = set()
    while not done:
        base = tmp_path / str(moment)
        output = base / "out"
        base.mkdir()
        (base / ".out.draft-notours1").mkdir()
        (base / "notes.txt").write_bytes(b"theirs")
        publish(output)
        with pytest.MonkeyPatch.context() as patch:
            if not exchange:
                patch.setattr(swap, "_exchange", lambda one, other: False)
            deadly(patch, moment, (swap, "_exchange"))
            try:
                publish(output, new)
                done = True
            except Killed:
                pass
        # What the dead build held open; the libraries that are loaded here were frozen.
        gc.collect()
        remove_leftovers(output)
        known = replacing.recorded(output)
        assert known is not None
        assert replacing.holdings(output).strange == ()
        files = FILES if known.keys() == FILES.keys() else new
        assert all((output / name).read_bytes() == content for name, content in files.items())
        seen.add(len(files))
        # An empty folder proves nothing: one that was killed between its marker and itself stays.
        left = {path.name for path in base.iterdir() if path.is_file() or any(path.iterdir())}
        assert left == {"out", "notes.txt"}
        assert (base / ".out.draft-notours1").is_dir()
        moment += 3
    assert seen == {2, 3}
    assert moment > 15


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("exchange", [True, False])
def test_a_disk_that_fails_at_any_moment(tmp_path, error, exchange, monkeypatch):
    """One call fails, as on a full disk, and the build goes on to its end: the bundle is the old one or the new."""
    real = Path.rename
    for moment in range(6):
        base = tmp_path / str(moment)
        output = base / "out"
        base.mkdir()
        publish(output)
        turns = []

        def rename(path: Path, target: Path, moment: int = moment, turns: list[Path] = turns):
            turns.append(path)
            if len(turns) == moment + 1:
                raise OSError(error, os.strerror(error), str(path))
            return real(path, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", rename)
            if not exchange:
                patch.setattr(swap, "_exchange", lambda one, other: False)
            with suppress(OSError, EdgeshipError):
                publish(output, {"new.bin": b"new"})
        remove_leftovers(output)
        assert replacing.holdings(output).strange == ()
        assert [path.name for path in base.iterdir()] == ["out"]
