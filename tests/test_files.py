"""Files: whole or not at all, and refusals in one line."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from dit_lens import files
from dit_lens.errors import InputError


def test_writes_into_a_new_folder_and_leaves_nothing_beside(tmp_path: Path) -> None:
    files.write_text(tmp_path / "new" / "a.txt", "\u03c3")
    assert (tmp_path / "new" / "a.txt").read_text(encoding="utf-8") == "\u03c3"
    assert os.listdir(tmp_path / "new") == ["a.txt"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_refusal_keeps_the_old_file_and_leaves_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    target = tmp_path / "a.txt"
    files.write_text(target, "old")

    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.raises(InputError, match=f"cannot write in .*{os.strerror(number)}"):
            files.write_text(target, "new")
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_full_disk_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_bytes

    def fills(path: Path, data: bytes) -> int:
        write(path, data[:1])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", fills)
    with pytest.raises(InputError, match="No space left"):
        files.write_bytes(tmp_path / "a", b"abc")
    with pytest.raises(InputError, match="No space left"):
        files.check_writable(tmp_path)
    assert os.listdir(tmp_path) == []


def test_check_writable_makes_nothing(tmp_path: Path) -> None:
    files.check_writable(tmp_path / "deep" / "down")
    assert os.listdir(tmp_path) == []


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file is a file"):
        files.check_writable(tmp_path / "file" / "out")
