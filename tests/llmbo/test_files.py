"""A file that is replaced is the old one or the new one, and nothing lies beside it."""

import os
from pathlib import Path

import pytest

from llmbo.files import replace_file


@pytest.mark.parametrize(("content", "expected"), [("Grüße", "Grüße".encode()), (b"\xff\n", b"\xff\n"), ("", b"")])
def test_what_is_written_is_what_is_there(tmp_path: Path, content: str | bytes, expected: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_text("older and longer than what comes")
    replace_file(path, content)
    assert path.read_bytes() == expected and os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("fails", ["write_bytes", "replace"])
def test_a_fault_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((Path, fails) if fails == "write_bytes" else (os, fails)), full)
    with pytest.raises(OSError, match="No space"):
        replace_file(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]


def test_another_process_that_writes_the_same_file_is_not_disturbed(tmp_path: Path) -> None:
    """What it has begun to write beside the file stays its own."""
    theirs = tmp_path / f".a.json.{os.getpid() + 1}"
    theirs.write_text("half")
    replace_file(tmp_path / "a.json", "ours")
    assert theirs.read_text() == "half"
