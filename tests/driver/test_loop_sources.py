"""The loop with prompts from a mixture and from a curriculum: scores reach the sampler, and resuming changes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from sae_rl import checkpoint
from sae_rl.data.curriculum import CurriculumSampler
from sae_rl.data.mixture import MixtureSampler
from sae_rl.data.sampler import PromptSampler, Sampler
from sae_rl.driver import train
from sae_rl.overlapped import train_overlapped
from sae_rl.run import Run
from sae_rl.seeds import derive_seed
from sae_rl.types import Prompt

from .scripted import ScriptedWorkers, make_config, make_run

STEPS = 9
OVERLAPPED = ["schedule=overlapped", "schedule.max_staleness=1", "algorithm.policy_loss.correction.mode=truncate"]


def prompts(part: str, first: int, count: int) -> list[Prompt]:
    return [
        Prompt(id=f"{part}/{i}", text="q", token_ids=(i, 7), answer="a", task=part, reward="exact")
        for i in range(first, first + count)
    ]


def sampler(seed: int) -> PromptSampler:
    levels = {level: prompts("chains", 1000 * (level + 1), 8) for level in range(3)}
    chains = CurriculumSampler(levels, seed, promote_at=0.4, window_prompts=4)
    return MixtureSampler({"plain": Sampler(prompts("plain", 0, 5), seed), "chains": chains}, {"plain": 1, "chains": 2})


def run_in(folder: Path, workers: ScriptedWorkers, *overrides: str, resume_from: Path | None = None) -> Run:
    config = make_config(folder, f"steps={STEPS}", "rollout.prompts_per_step=3", *overrides)
    return make_run(config, workers, resume_from, sampler=sampler(config.seed))


def generated(workers: ScriptedWorkers) -> list[tuple[str, list[str]]]:
    return [(call.of["seed_name"], call.of["prompts"]) for call in workers.asked("generate")]


def levels_of(workers: ScriptedWorkers) -> list[float]:
    return [call.of["metrics"]["data/level_mean"] for call in workers.asked("log") if call.of["phase"] == "train"]


def test_parts_are_drawn_by_weight_and_scores_move_the_curriculum_on(tmp_path: Path) -> None:
    workers = ScriptedWorkers()
    train(run_in(tmp_path, workers))
    drawn = [name for _, names in generated(workers) for name in names]
    assert Counter(name.split("/")[0] for name in drawn) == {"plain": STEPS, "chains": 2 * STEPS}
    levels = levels_of(workers)
    assert levels == sorted(levels) and levels[0] == 0 and levels[-1] == 2, levels
    chains = [int(name.split("/")[1]) // 1000 - 1 for name in drawn if name.startswith("chains")]
    assert chains == sorted(chains) and set(chains) == {0, 1, 2}


@pytest.mark.parametrize("loop", [train, train_overlapped])
@pytest.mark.parametrize("crash_at", [3, 4, 7])
@pytest.mark.parametrize("dynamic", ["none", "resample"])
def test_a_resumed_run_draws_what_the_straight_one_does(
    dynamic: str, crash_at: int, loop: Callable[[Run], None], tmp_path: Path
) -> None:
    overrides = [f"rollout.dynamic_sampling.mode={dynamic}", "rollout.dynamic_sampling.max_rounds=20"]
    if loop is train_overlapped:
        overrides += OVERLAPPED
    whole, first, second = ScriptedWorkers(), ScriptedWorkers(), ScriptedWorkers()
    loop(run_in(tmp_path / "whole", whole, *overrides))
    first.fail_in_update = derive_seed(100, "update", crash_at)
    with pytest.raises(RuntimeError, match="a worker died"):
        loop(run_in(tmp_path / "run", first, *overrides))
    newest = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert newest is not None
    loop(run_in(tmp_path / "run", second, *overrides, resume_from=newest))
    start = crash_at // 2 * 2
    later = {f"step {step}" for step in range(start, STEPS)}
    expected = [call for call in generated(whole) if call[0].split(" round")[0] in later]
    if loop is train:  # which weights sample a batch of an overlapped run, and so its scores, is a matter of threads
        assert generated(second) == expected
        assert levels_of(second) == levels_of(whole)[start:]
    else:
        assert generated(second)[0] == next(call for call in generated(first) if call[0] == f"step {start}")


def test_partial_rollouts_tell_the_sampler_what_groups_scored(tmp_path: Path) -> None:
    workers = ScriptedWorkers()
    overlapped = ["schedule=overlapped", "schedule.max_staleness=2", "schedule.weight_updates=in_flight"]
    train_overlapped(run_in(tmp_path, workers, *overlapped, "rollout.prompts_under_way=5"))
    levels = levels_of(workers)
    assert levels == sorted(levels) and levels[0] < levels[-1], levels


def test_a_critic_is_pretrained_on_prompts_by_weight_of_the_first_level(tmp_path: Path) -> None:
    workers = ScriptedWorkers(qualities=[0.5] * 50)
    train(run_in(tmp_path, workers, "learner.critic_pretraining.num_prompts=6"))
    (names,) = [names for seed_name, names in generated(workers) if seed_name == "pretraining"]
    assert Counter(name.split("/")[0] for name in names) == {"plain": 2, "chains": 4}
    assert all(1000 <= int(name.split("/")[1]) < 2000 for name in names if name.startswith("chains"))
