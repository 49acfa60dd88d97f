"""Folders that hold a run already: it is continued or left as it is, never half of both."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from sae_rl import checkpoint
from sae_rl.commands.run_folder import require_consent
from sae_rl.config.schema import as_tree
from sae_rl.data.sampler import Sampler
from sae_rl.types import Prompt

from ..conftest import CommandLine, Outcome
from ..driver.scripted import make_config
from .refused import assert_refused


def test_an_output_folder_that_cannot_be_written(train: Callable[..., Outcome], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    outcome = train(f"output_dir={tmp_path}/file/run")
    assert_refused(outcome, f"output_dir = {tmp_path}/file/run", "cannot write", "Not a directory")


def make_checkpoint(folder: Path, step: int) -> None:
    (folder / f"step_{step:06d}").mkdir(parents=True)
    (folder / f"step_{step:06d}" / "driver.json").write_text(json.dumps({"step": step, "sampler": {}}))
    checkpoint.write_manifest(folder / f"step_{step:06d}", {})


def test_nothing_is_left_to_train(train: Callable[..., Outcome], tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "out" / "checkpoints", 2)
    (tmp_path / "out" / "checkpoints" / "step_000002" / "hf").mkdir()
    assert_refused(train("steps=2"), "steps = 2", "step_000002", "raise steps")


def test_a_new_run_over_an_old_one(train: Callable[..., Outcome], tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "out" / "checkpoints", 1)
    assert_refused(train("resume=false"), "output_dir = out", "step_000001", "resume=true")


def leave_a_run(folder: Path) -> dict[str, bytes]:
    """What a run of other prompts left after step 1: its files, and what is in them."""
    other = [Prompt(id="p", text="q", token_ids=(1,), answer="a", task="t", reward="exact")]
    make_checkpoint(folder / "checkpoints", 1)
    state = {"step": 1, "sampler": Sampler(other, seed=0).state()}
    (folder / "checkpoints" / "step_000001" / "driver.json").write_text(json.dumps(state))
    for role in ("policy", "critic"):
        (folder / "checkpoints" / "step_000001" / role).mkdir(exist_ok=True)
        (folder / "checkpoints" / "step_000001" / role / "random_state_0.pt").touch()
    (folder / "rollouts").mkdir()
    (folder / "rollouts" / "step_000001.parquet").touch()
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "phase": "train", "time": 0.0}) + "\n")
    (folder / "config.yaml").write_text("seed: 1\n")
    return content(folder)


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_run_of_other_prompts_is_not_continued_and_keeps_its_records(
    train: Callable[..., Outcome], tmp_path: Path
) -> None:
    before = leave_a_run(tmp_path / "out")
    assert_refused(train("steps=5"), "cannot resume from out/checkpoints/step_000001", "other prompts")
    assert content(tmp_path / "out") == before


def test_a_critic_is_not_pretrained_over_a_run(sae_rl: CommandLine, tiny_model: Path, tmp_path: Path) -> None:
    before = leave_a_run(tmp_path / "out")
    outcome = sae_rl("pretrain-critic", f"model.path={tiny_model}", "output_dir=out", "rollout.max_response_tokens=64")
    assert_refused(outcome, "output_dir = out holds a run already", "choose another output_dir")
    assert content(tmp_path / "out") == before


OTHERS = {
    "a knob of the estimator": ("algorithm.estimator.lam=0.5", "algorithm.estimator.lam: 0.95 -> 0.5"),
    "an estimator": ("algorithm=gae", "algorithm.estimator.name: 'sae' -> 'gae'"),
    "a segmenter": ("algorithm/segmenter=entropy", "algorithm.segmenter.name: 'low_probability' -> 'entropy'"),
    "a model": ("model.path=somebody/something", "model.path: 'nobody/nothing' -> 'somebody/something'"),
}


def leave_a_checkpoint(folder: Path) -> Path:
    """A run's configuration, and its checkpoint after one step."""
    make_checkpoint(folder / "checkpoints", 1)
    folder.joinpath("config.yaml").write_text(
        yaml.safe_dump(as_tree(make_config(folder, "algorithm.estimator.lam=0.95")))
    )
    return folder / "checkpoints" / "step_000001"


@pytest.mark.parametrize("name", OTHERS)
def test_another_algorithm_or_model_asks_for_consent(train: Callable[..., Outcome], tmp_path: Path, name: str) -> None:
    leave_a_checkpoint(tmp_path / "out")
    before = content(tmp_path / "out")
    override, difference = OTHERS[name]
    same = ["model.path=nobody/nothing", "model.context_tokens=1024", "algorithm.estimator.lam=0.95"]
    outcome = train("steps=5", *same, override)
    assert_refused(outcome, "output_dir = out holds step_000001 of a run", difference, "resume=force continues it")
    assert content(tmp_path / "out") == before


def test_consent_is_not_asked_for_other_keys_or_with_force(tmp_path: Path) -> None:
    newest = leave_a_checkpoint(tmp_path)
    (newest / "critic").mkdir()
    same = "algorithm.estimator.lam=0.95"
    require_consent(make_config(tmp_path, same, "steps=50", "learner.policy.optimizer.lr=1e-3"), newest)
    require_consent(make_config(tmp_path, "algorithm.estimator.lam=0.5", "resume=force"), newest)


def test_a_checkpoint_without_critic_cannot_go_on_with_one(tmp_path: Path) -> None:
    newest = leave_a_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="it has no critic, which this run needs"):
        require_consent(make_config(tmp_path, "algorithm.estimator.lam=0.5", "resume=force"), newest)
    require_consent(make_config(tmp_path, "algorithm=grpo", "resume=force"), newest)


def test_a_checkpoint_of_another_number_of_critics_cannot_go_on(tmp_path: Path) -> None:
    newest = leave_a_checkpoint(tmp_path)
    (newest / "critic").mkdir()
    ensemble = ("algorithm/value_source=ensemble", "algorithm.value_source.num_critics=2", "resume=force")
    with pytest.raises(
        ValueError, match="holds step_000001 with 1 critics, but this run has 2; choose another output_dir"
    ):
        require_consent(make_config(tmp_path, *ensemble), newest)
