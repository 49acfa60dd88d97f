"""Temporary folders are removed whatever is in them, or what stays is said."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sae_rl.sandbox.folders import holds_more, remove


def make_deep(folder: Path, depth: int, name: str = "d") -> None:
    """Deeper than a path may be long."""
    opened = os.open(folder, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir(name, dir_fd=opened)
        below = os.open(name, os.O_RDONLY, dir_fd=opened)
        os.close(opened)
        opened = below
    os.close(os.open("file", os.O_CREAT, dir_fd=opened))
    os.close(opened)


def test_what_is_not_removed_in_time_is_said_and_can_be_removed_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    make_deep(folder, 1200, "d" * 9)
    (folder / "out").symlink_to(tmp_path)
    remove(str(folder), 0.0)
    assert "removing it takes too long" in caplog.text and folder.exists()
    remove(str(folder), 60.0)
    assert list(tmp_path.iterdir()) == []
    remove(str(folder), 1.0)
    assert f"stays: {folder} ([Errno 2]" in caplog.text


def test_what_a_folder_holds(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}").mkdir()
        (tmp_path / f"{i}" / "file").write_bytes(b"1" * 2**20)
    assert not holds_more(str(tmp_path), 2**22, 6)
    assert holds_more(str(tmp_path), 2**22, 5)
    assert holds_more(str(tmp_path), 2**21, 6)
    assert not holds_more(str(tmp_path / "none"), 0, 0)
    deep = tmp_path / "deep"
    deep.mkdir()
    make_deep(deep, 20, "d" * 255)
    assert holds_more(str(deep), 2**30, 1000), "a path that is too long hides what is below"
    remove(str(deep), 60.0)
