"""`sae-rl doctor` with the real Ray, vLLM and DeepSpeed: a sound machine, and a cluster that is too small."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import call
from tests.stack.conftest import no_process_left, overrides

pytestmark = pytest.mark.alone

LINKS = [
    "start of all workers",
    "all-reduce",
    "weight transfer",
    "rollout",
    "update",
    "weight transfer after an update",
]


def test_every_link_of_a_sound_machine_passes(tiny_model: Path, tmp_path: Path) -> None:
    with no_process_left():
        done = call("doctor", *overrides(tiny_model, tmp_path))
    assert done.code == 0, done.stdout + done.stderr
    verdicts = {line[16:].partition(":")[0]: line[:16].strip() for line in done.stdout.splitlines()}
    assert all(verdicts[name] == "passed" for name in ("nodes", "packages", *LINKS, "checkpoint and resume")), verdicts
    assert all(verdicts[name] == "not applicable" for name in ("shared storage", "ports", "kernels", "sleep and wake"))
    assert list(tmp_path.iterdir()) == []


def test_a_cluster_without_room(tiny_model: Path, tmp_path: Path) -> None:
    many = ["cluster.policy.num_workers=16", "learner.policy.num_mini_batches=1"]
    done = call("doctor", *overrides(tiny_model, tmp_path), *many)
    assert done.code == 1
    assert "failed          start of all workers: the run needs" in done.stdout and "-> read" in done.stdout
    assert "1 check(s) failed" in done.stderr and "passed          nodes" in done.stdout
