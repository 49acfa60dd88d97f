"""Output on local disks of several nodes is found out before a model loads, and before a checkpoint counts as complete.

A node is a folder here: a worker of another node replaces the driver's root by its own.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sae_rl.digests import Digest, digests_of
from sae_rl.settings import ConfigError
from sae_rl.workers import shared_folder
from sae_rl.workers.group import WorkerError
from sae_rl.workers.shared_folder import answer_nonce, check_shared, check_written

HERE = "shared"


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_folder, "ARRIVES_S", 0.3)
    monkeypatch.setattr(shared_folder, "POLL_S", 0.01)


class Worker:
    """A learner whose storage is a folder of ``root``."""

    def __init__(self, root: Path, disk: str) -> None:
        self.root, self.disk = root, disk
        self.answer_nonce = SimpleNamespace(remote=lambda nonce: answer_nonce(self.local(nonce)))

    def local(self, path: Path) -> Path:
        return self.root / self.disk / path.relative_to(self.root / HERE)


class Group:
    """What `check_shared` needs of a `WorkerGroup`."""

    def __init__(self, role: str, root: Path, disks: Sequence[str]) -> None:
        self.role, self.workers = role, [Worker(root, disk) for disk in disks]
        self.places = [SimpleNamespace(host=f"node-{disk}") for disk in disks]

    def run(self, call: Callable[[Worker], Any]) -> list[Any]:
        return [call(worker) for worker in self.workers]


def check(root: Path, policy: Sequence[str], critic: Sequence[str]) -> None:
    groups: Any = {"policy": Group("policy", root, policy), "critic": Group("critic", root, critic)}
    check_shared(groups, root / HERE / "run")


def test_shared_storage_is_recognized_and_left_clean(tmp_path: Path) -> None:
    check(tmp_path, [HERE, HERE], [HERE])
    assert list((tmp_path / HERE / "run").iterdir()) == []


def test_the_nodes_that_do_not_share_are_named(tmp_path: Path) -> None:
    for disk in ("b", "c"):
        (tmp_path / disk / "run").mkdir(parents=True)  # the same path exists there
    with pytest.raises(
        ConfigError, match=r"policy 1, critic 0 on node-b; critic 1 on node-c\. .*set output_dir"
    ) as error:
        check(tmp_path, [HERE, "b"], ["b", "c"])
    assert "output_dir = " in str(error.value)
    assert [list((tmp_path / disk / "run").iterdir()) for disk in (HERE, "b", "c")] == [[], [], []]


def test_a_worker_whose_files_do_not_arrive_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker sees a copy of the driver's folder, as on storage that is copied to nodes but not back."""
    monkeypatch.setattr(Worker, "local", lambda self, path: Path(shutil.copytree(path, tmp_path / "copy")))
    with pytest.raises(ConfigError, match="policy 0 on node-b"):
        check(tmp_path, ["b"], [])


def group(tmp_path: Path) -> Any:
    return Group("critic", tmp_path, [HERE, HERE])


def test_files_that_arrived_are_accepted(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text("weights")
    check_written(group(tmp_path), [digests_of([tmp_path / "a"]), digests_of([tmp_path / "b"])])


@pytest.mark.parametrize(
    ("sizes", "found"),
    [
        ({}, "critic worker 1 on node-shared wrote no file"),
        ({"lost": 7}, r"critic worker 1 on node-shared wrote \S+lost with 7 bytes, .* finds no such file: output_dir"),
        ({"a": 9}, r"wrote \S+a with 9 bytes, but .* finds 7 bytes"),
    ],
)
def test_files_that_are_missing_or_short_are_named(tmp_path: Path, sizes: dict[str, int], found: str) -> None:
    (tmp_path / "a").write_text("weights")
    ranks = [digests_of([tmp_path / "a"]), {str(tmp_path / name): Digest(size, "") for name, size in sizes.items()}]
    with pytest.raises(WorkerError, match=found):
        check_written(group(tmp_path), ranks)


def test_a_file_that_comes_late_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_folder.time, "sleep", lambda seconds: (tmp_path / "late").write_text("weights"))
    check_written(group(tmp_path), [{str(tmp_path / "late"): Digest(7, "")}])


def test_a_worker_that_did_not_write_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="shard"):
        digests_of([tmp_path / "shard"])
