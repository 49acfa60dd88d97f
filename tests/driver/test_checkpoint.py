"""A crash at any moment of a save leaves the last checkpoint usable, and nothing that looks like one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from sae_rl import checkpoint
from sae_rl.checkpoint import DriverState
from sae_rl.data.sampler import Sampler

from .scripted import ScriptedWorkers, make_prompts


class Broken(ScriptedWorkers):
    """Dies in the middle of writing."""

    def save(self, folder: Path) -> None:
        super().save(folder)
        raise OSError("no space left on device")


def state(step: int) -> DriverState:
    return DriverState(step=step, sampler=Sampler(make_prompts(), 0).state())


def save(root: Path, step: int, keep_last: int = 10, workers: ScriptedWorkers | None = None) -> Path:
    workers = workers or ScriptedWorkers(version=step)
    return checkpoint.save(root, state(step), workers, keep_last)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_a_checkpoint_is_read_as_it_was_written(tmp_path: Path) -> None:
    folder = save(tmp_path / "new" / "checkpoints", 40)
    assert folder.name == "step_000040"
    assert checkpoint.newest(folder.parent) == folder
    assert checkpoint.read_state(folder) == state(40)
    assert (folder / "policy" / "weights").read_text() == "40"


def test_a_save_that_fails_half_way_changes_nothing(tmp_path: Path) -> None:
    good = save(tmp_path, 3)
    with pytest.raises(OSError, match="no space"):
        save(tmp_path, 5, workers=Broken(version=5))
    assert checkpoint.newest(tmp_path) == good
    assert [name for name in names(tmp_path) if name.startswith("step_")] == ["step_000003"]
    assert checkpoint.read_state(good).step == 3


def test_leftovers_are_removed_by_the_next_save(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no space"):
        save(tmp_path, 5, workers=Broken(version=5))
    assert checkpoint.newest(tmp_path) is None
    assert any(name.startswith(".partial_") for name in names(tmp_path))
    save(tmp_path, 5)
    assert names(tmp_path) == ["step_000005"]


@pytest.mark.parametrize("moment", ["rename", "fsync", "write_text"])
def test_a_crash_before_the_rename_leaves_no_checkpoint(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = save(tmp_path, 1)

    def crash(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os if moment == "fsync" else Path, moment, crash)
        workers = ScriptedWorkers(version=2)
        workers.save = lambda folder: None  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2, workers=workers)
    assert checkpoint.newest(tmp_path) == good


def test_a_crash_while_old_ones_are_removed_leaves_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def crash(folder: Path) -> None:
        (Path(folder) / "driver.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", crash)
        save(tmp_path, 2, keep_last=1)
    newest = checkpoint.newest(tmp_path)
    assert newest is not None and checkpoint.read_state(newest).step == 2
    save(tmp_path, 3, keep_last=1)
    assert names(tmp_path) == ["step_000003"]


@pytest.mark.parametrize("keep_last", [1, 2, 5])
def test_only_the_newest_are_kept(tmp_path: Path, keep_last: int) -> None:
    for step in (0, 9, 10, 99, 100):
        save(tmp_path, step, keep_last)
    assert names(tmp_path) == [f"step_{step:06d}" for step in (0, 9, 10, 99, 100)][-keep_last:]


def test_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 4)
    folder = save(tmp_path, 4, workers=ScriptedWorkers(version=77))
    assert (folder / "policy" / "weights").read_text() == "77"
    assert names(tmp_path) == ["step_000004"]


def test_what_is_no_checkpoint_is_said_so(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "nowhere") is None
    (tmp_path / "step_000001").mkdir()
    with pytest.raises(ValueError, match=r"step_000001 is no checkpoint: .*driver\.json"):
        checkpoint.read_state(tmp_path / "step_000001")
    (tmp_path / "step_000001" / "driver.json").write_text('{"stepp": 1}')
    with pytest.raises(ValueError, match="is no checkpoint"):
        checkpoint.read_state(tmp_path / "step_000001")
