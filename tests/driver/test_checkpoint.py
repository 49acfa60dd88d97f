"""A crash at any moment of a save leaves the last checkpoint usable, and nothing that looks like one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from sae_rl import checkpoint
from sae_rl.checkpoint import DriverState
from sae_rl.data.sampler import Sampler
from sae_rl.digests import Digests

from .scripted import ScriptedWorkers, make_prompts


class Broken(ScriptedWorkers):
    """Dies in the middle of writing."""

    def save(self, folder: Path) -> Digests:
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
        workers.save = lambda folder: {}  # type: ignore[method-assign]
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


def flip(file: Path, byte: int = 0) -> None:
    content = bytearray(file.read_bytes())
    content[byte] ^= 1
    file.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped bit": (
        lambda folder: flip(folder / "policy" / "weights"),
        "policy/weights has another content than was written",
    ),
    "cut file": (lambda folder: (folder / "policy" / "weights").write_text("7"), "policy/weights has 1 of 2 bytes"),
    "lost file": (lambda folder: (folder / "policy" / "weights").unlink(), "policy/weights is missing"),
    "driver's part": (lambda folder: flip(folder / "driver.json", -1), "driver.json has another content"),
    "empty manifest": (lambda folder: (folder / "manifest.json").write_text(""), "manifest.json cannot be read"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "it has no manifest.json: an older version"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_taken(tmp_path: Path, damage: str) -> None:
    change, said = DAMAGES[damage]
    good, bad = save(tmp_path, 76), save(tmp_path, 77)
    assert checkpoint.newest_intact(tmp_path) == (bad, {})
    change(bad)
    intact, damaged = checkpoint.newest_intact(tmp_path)
    assert intact == good and list(damaged) == [bad.name] and said in damaged[bad.name]
    change(good)
    intact, damaged = checkpoint.newest_intact(tmp_path)
    assert intact is None and list(damaged) == [bad.name, good.name]


def test_a_damaged_one_is_set_aside_and_takes_no_place_of_those_that_are_kept(tmp_path: Path) -> None:
    for _ in range(2):  # the second time there is one of that name
        save(tmp_path, 30)
        flip(save(tmp_path, 40) / "driver.json")
        checkpoint.set_aside(tmp_path, ["step_000040"])
        assert checkpoint.newest(tmp_path) == tmp_path / "step_000030"
    save(tmp_path, 36, keep_last=1)
    assert names(tmp_path) == ["damaged_step_000040", "step_000036"]


def test_every_bit_of_every_file_is_covered(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    listed = json.loads((folder / "manifest.json").read_text())
    assert listed["versions"]["sae-rl"] == version("sae-rl")
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != "manifest.json"]
    assert sorted(listed["files"]) == sorted(str(file.relative_to(folder)) for file in files)
    for file in files:
        whole = file.read_bytes()
        for bit in range(8 * len(whole)):
            file.write_bytes(whole[: bit // 8] + bytes([whole[bit // 8] ^ (1 << bit % 8)]) + whole[bit // 8 + 1 :])
            assert checkpoint.damages_of(folder), (file, bit)
        file.write_bytes(whole)
    assert checkpoint.damages_of(folder) == []


def test_the_newest_has_the_largest_number_and_others_are_left_alone(tmp_path: Path) -> None:
    for name in ("step_000006.bak", "step_backup", "step_7"):
        (tmp_path / name).mkdir()
    for step in (6, 999_999, 1_000_000):
        newest = save(tmp_path, step, keep_last=2)
    assert checkpoint.newest(tmp_path) == newest and newest.name == "step_1000000"
    assert names(tmp_path) == ["step_000006.bak", "step_1000000", "step_7", "step_999999", "step_backup"]


def test_a_checkpoint_of_another_step_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, 4).rename(tmp_path / "step_000005")
    with pytest.raises(ValueError, match=r"step_000005 is no checkpoint: .* is that of step 4"):
        checkpoint.read_state(folder)


def test_what_is_no_checkpoint_is_said_so(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "nowhere") is None
    (tmp_path / "step_000001").mkdir()
    with pytest.raises(ValueError, match=r"step_000001 is no checkpoint: .*driver\.json"):
        checkpoint.read_state(tmp_path / "step_000001")
    (tmp_path / "step_000001" / "driver.json").write_text('{"stepp": 1}')
    with pytest.raises(ValueError, match="is no checkpoint"):
        checkpoint.read_state(tmp_path / "step_000001")
