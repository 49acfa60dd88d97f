"""`sae-rl correlate` on a trained checkpoint, killed and started again, with the real engines and learners."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from sae_rl.correlation.files import RESPONSES, TENSORS, load
from sae_rl.correlation.measurements import neutral_places
from sae_rl.records.rollouts import read_scored
from tests.conftest import Outcome, call
from tests.stack.conftest import ROOT, no_process_left, trained

pytestmark = pytest.mark.alone
SETTINGS = [
    "correlation.num_prompts=4",
    "correlation.responses_per_prompt=3",
    "correlation.k=2",
    "correlation.every=4",
    "correlation.gradient_dimension=100",
    "rollout.prompts_per_step=3",
    "logger.console=plain",
]


def measured(*arguments: str) -> Outcome:
    with no_process_left():
        done = call("correlate", *arguments, *SETTINGS)
    assert done.code == 0, done.stderr
    return done


def test_a_killed_measurement_goes_on_and_ends_with_the_bytes_of_a_straight_one(
    tiny_model: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    trained(tiny_model, run)
    checkpoint, folder = f"correlation.checkpoint={run}", run / "correlation" / "step_000002"

    arguments = [sys.executable, "-m", "sae_rl", "correlate", checkpoint, *SETTINGS]
    with subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True) as process:
        try:
            deadline = time.monotonic() + 200
            while not (folder / "parts" / "returns_00000.safetensors").exists():
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.01)
            children = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGKILL)
            process.wait(timeout=60)
            psutil.wait_procs(children, timeout=90)  # Ray's agents take a minute to notice
        finally:
            process.kill()
    assert not (folder / TENSORS).exists() and not (folder / "parts" / "returns_00003.safetensors").exists()

    refused = call("correlate", checkpoint, *SETTINGS, "correlation.k=3", "cluster.call_timeout_s=100")
    assert refused.code == 2 and "correlation.k: 2 -> 3; choose another output_dir" in refused.stderr

    before = (folder / "parts" / "returns_00000.safetensors").stat().st_mtime_ns
    again = measured(checkpoint)
    assert (folder / "parts" / "returns_00000.safetensors").stat().st_mtime_ns == before
    assert "left out: delimiter" in again.stdout and "continuations: 4 of 4 prompts" in again.stdout
    measured(checkpoint, f"output_dir={tmp_path / 'straight'}")
    for name in (TENSORS, RESPONSES):
        assert (folder / name).read_bytes() == (tmp_path / "straight" / name).read_bytes(), name
    assert_measured(folder)


def assert_measured(folder: Path) -> None:
    found = load(folder)
    assert found.num_prompts == 4 and found.batch.num_responses == 12
    assert found.batch.policy_versions.unique().tolist() == [2], "the engines have the checkpoint's weights"
    neutral = neutral_places(found.batch.lengths, 4)
    assert torch.equal(found.places[found.neutral], neutral)
    assert found.continued.shape == (len(found.places), 2)
    assert {0.0, 1.0} == set(found.continued.unique().tolist())
    rollouts, rewards, _, scores = read_scored(folder / RESPONSES)
    assert rewards == found.returns.tolist() and len(rollouts) == 12
    assert scores.old_logprobs is not None and scores.values is not None and scores.entropies is not None
    assert (scores.old_logprobs - found.batch.rollout_logprobs).abs().max() < 1e-4
    assert scores.values.std() > 0 and scores.entropies.min() > 0
    assert found.gradients is not None and found.gradients.shape == (len(found.names) + 1, 4, 100)
    # Estimators differ in their advantages alone, so equal combinations of advantages have equal gradients.
    sae, gae = found.names.index("sae"), found.names.index("gae")
    assert not torch.equal(found.gradients[sae], found.gradients[gae])
    assert "delimiter" not in found.names and "grpo" in found.names and "continuations" in found.names
    costs = json.loads((folder / "parts" / "cost.json").read_text())
    assert costs["responses"]["tokens"] == found.batch.num_tokens
