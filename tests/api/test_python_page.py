"""docs/python.md does what it says: its blocks run one after another, as a reader would run them."""

import re
import textwrap

BLOCK = re.compile(r"(?P<before>[^\n]*)\n```py\n(?P<code>.*?)```", re.DOTALL)


def test_the_page_runs(root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = (root / "docs" / "python.md").read_text(encoding="utf-8")
    blocks = [match for match in BLOCK.finditer(page) if match["before"] != "<!-- heavy -->"]
    assert len(blocks) >= 7
    known: dict[str, object] = {}
    for match in blocks:
        # A block that does not run says where it stands in the page.
        line = page[: match.start("code")].count("\n")
        code = "\n" * line + textwrap.dedent(match["code"])
        exec(compile(code, "docs/python.md", "exec"), known)
    assert known["problems"] == []
    assert known["scores"].shape == (1, 4)
    assert known["same"].report == known["bundle"].report
    assert sorted(item.name for item in tmp_path.iterdir()) == ["net.edgeship"]
    assert "check/size fell short on tflite" in capsys.readouterr().out
