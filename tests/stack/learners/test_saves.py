"""A checkpoint counts as complete only when the driver finds every shard that the ranks wrote, and ``hf/``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import ray

from sae_rl import checkpoint
from sae_rl.checkpoint import DriverState
from sae_rl.data.sampler import Sampler
from sae_rl.digests import Digests
from sae_rl.workers import shared_folder
from sae_rl.workers.group import WorkerError
from tests.driver.scripted import make_prompts
from tests.stack.conftest import Configure, for_learners
from tests.stack.learners.conftest import Learners

pytestmark = pytest.mark.alone

STATE = Sampler(make_prompts(), 0).state()


def writes_nothing(worker: Any) -> None:
    """Runs inside a rank: DeepSpeed's shards of this rank are not written."""
    worker._learner.engine.checkpoint_engine.save = lambda state, path: None


def writes_elsewhere(worker: Any) -> None:
    """Runs inside a rank: its files are there for the rank that measures them, and not for the driver."""
    from sae_rl.workers import learner

    measure = learner.digests_of

    def measured_once(files: Iterable[str]) -> Digests:
        learner.digests_of = measure
        found = measure(files)
        for file in found:
            Path(file).unlink()
        return found

    learner.digests_of = measured_once


def exports_nothing(worker: Any) -> None:
    """Runs inside rank 0 of the policy."""
    worker._learner.network.export = lambda weights, base, folder: [None for _ in weights]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_all_files_of_all_ranks_are_checked(
    configure: Configure, learners: Learners, stage: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[str] = []
    found = shared_folder._size
    monkeypatch.setattr(shared_folder, "_size", lambda file: (checked.append(file), found(file))[1])
    folder = checkpoint.save(
        tmp_path,
        DriverState(step=1, sampler=STATE),
        learners(configure(*for_learners(num_workers=2, zero_stage=stage))),
        keep_last=2,
    )
    names = {Path(file).relative_to(tmp_path / ".partial_step_000001") for file in checked}
    written = {file.relative_to(folder) for file in folder.rglob("*") if file.is_file()}
    unchecked = {file.name for file in written - names if file.suffix != ".py"}  # DeepSpeed adds a script
    assert unchecked == {"driver.json", "manifest.json"}
    assert set(json.loads((folder / "manifest.json").read_text())["files"]) == {*map(str, names), "driver.json"}
    assert len(names) >= 2 * 3 and any(file.parent.name == "hf" for file in names)


@pytest.mark.parametrize(
    ("role", "rank", "fault", "message"),
    [
        ("critic", 1, writes_nothing, r"critic worker 1 failed: FileNotFoundError: .*optim_states\.pt"),
        ("policy", 1, writes_elsewhere, r"policy worker 1 on \S+ wrote \S+ .* finds no such file: output_dir"),
        ("policy", 0, exports_nothing, r"policy worker 0 on \S+ wrote no file"),
    ],
)
def test_a_save_that_lost_files_leaves_the_last_checkpoint(
    configure: Configure,
    learners: Learners,
    role: str,
    rank: int,
    fault: Callable[[Any], None],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shared_folder, "ARRIVES_S", 0.3)
    workers = learners(configure(*for_learners(num_workers=2, zero_stage=2)))
    good = checkpoint.save(tmp_path, DriverState(step=1, sampler=STATE), workers, keep_last=1)
    ray.get(workers._groups[role].workers[rank].__ray_call__.remote(fault))  # type: ignore[attr-defined]
    with pytest.raises(WorkerError, match=message):
        checkpoint.save(tmp_path, DriverState(step=2, sampler=STATE), workers, keep_last=1)
    assert checkpoint.newest(tmp_path) == good
    workers.load(good)
