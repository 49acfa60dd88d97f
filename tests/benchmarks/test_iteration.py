"""The benchmark of one iteration: the configuration loads, responses cannot end early, and ratios are right."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from benchmarks import iteration, workload
from sae_rl.config.compose import load_config
from sae_rl.rewards.function import imported
from tests.data.loading import file_source, load_prompts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("workload")
    workload.make(made, num_steps=2)
    return made


def test_configuration_loads_with_one_update_of_four_micro_batches(folder: Path, tmp_path: Path) -> None:
    config = load_config(iteration.overrides(folder, tmp_path, steps=2))
    assert config.responses_per_step == workload.NUM_RESPONSES == 256
    assert config.learner.policy.num_mini_batches == config.learner.critic.num_mini_batches == 1
    assert config.learner.policy.micro_batch_tokens == 16 * (32 + 128)
    assert config.task.train.reward is not None
    assert imported(config.task.train.reward) is workload.parity


def test_no_response_can_end_early(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    config = json.loads((folder / "model" / "config.json").read_text())
    assert config["eos_token_id"] is None
    assert tokenizer.eos_token_id >= config["vocab_size"]


def test_prompts_fit_and_differ(folder: Path) -> None:
    source = file_source(folder / "prompts.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    prompts = load_prompts(source, tokenizer, workload.MAX_PROMPT_TOKENS)
    assert len(prompts) == 2 * workload.NUM_PROMPTS
    assert len({prompt.token_ids for prompt in prompts}) == len(prompts)
    assert min(len(prompt.token_ids) for prompt in prompts) >= 15


def test_ratio_is_of_medians_within_a_round_and_the_best_thread_count_counts() -> None:
    ours, one, two = iteration.programs(["ppo"], [1, 2])
    rows = {ours: [2.0, 4.0], one: [6.0, 10.0], two: [3.0, 6.0]}  # seconds of one iteration, by round
    figures = {p: [[{"generate": s / 2, "step": s}] for s in seconds] for p, seconds in rows.items()}
    found = iteration.summarize(figures, loads=[0.0])["programs"]
    assert found["TRL PPO"]["threads"] == 2
    assert found["TRL PPO"]["sae_rl_is_faster_by_in_each_round"] == [1.5, 1.5]
    assert found["sae_rl"]["tokens_per_s"] == pytest.approx(32_768 / 3)
    assert found["sae_rl"]["sae_rl_is_faster_by"] is None
