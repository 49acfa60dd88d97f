"""A critic pre-trained once, as a stage of its own, and a run that starts from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForTokenClassification, AutoTokenizer

from sae_rl.records.records import read_jsonl
from sae_rl.records.rollouts import read_rollouts, rollout_files
from tests.stack.conftest import overrides, run

pytestmark = pytest.mark.alone
ZERO_3 = "learner.critic.zero_stage=3"
PRETRAINING = ["learner.critic_pretraining.num_prompts=8", "learner.critic_pretraining.max_epochs=2"]


@pytest.fixture(scope="module")
def pretrained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "pretrained"
    done = run("pretrain-critic", *overrides(tiny_model, output, *PRETRAINING, ZERO_3))
    assert done.returncode == 0, done.stderr
    assert str(output / "critic") in done.stdout
    return output


def test_the_card_says_what_was_learnt(pretrained: Path, tiny_model: Path) -> None:
    card = json.loads((pretrained / "critic" / "critic.json").read_text())
    rows = [row for row in read_jsonl(pretrained / "metrics.jsonl") if row["phase"] == "pretraining"]
    assert card["explained_variance"] == max(row["pretraining/explained_variance"] for row in rows)
    assert card["num_responses"] == 32
    assert card["settings"]["model.path"] == str(tiny_model)
    assert not (pretrained / "policy").exists() and not (pretrained / "checkpoints").exists()


def test_a_run_of_another_zero_stage_starts_from_it(pretrained: Path, tiny_model: Path, tmp_path: Path) -> None:
    checkpoint = f"learner.critic_pretraining.checkpoint={pretrained / 'critic'}"
    options = [checkpoint, *PRETRAINING, "steps=1", "logger.rollouts_every_steps=1", "rollout.temperature=0.9"]
    done = run("train", *overrides(tiny_model, tmp_path / "run", *options, "logger.console=plain"))
    assert done.returncode == 0, done.stderr
    assert "held-out explained variance" in done.stdout
    assert "rollout.temperature 1.0 there, 0.9 here" in done.stdout
    assert "pretraining" not in {row["phase"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl")}
    critic = AutoModelForTokenClassification.from_pretrained(pretrained / "critic").eval()
    assert critic.num_labels == 1 and bool(critic.score.weight.any())
    (_, file), *_ = rollout_files(tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for row in read_rollouts(file).to_pylist()[:6]:
        prompt, response = tokenizer(row["prompt"]).input_ids, row["token_ids"]
        with torch.no_grad():
            states = critic(input_ids=torch.tensor([prompt + response])).logits[0, :, 0]
        expected = states[len(prompt) - 1 : -1]
        torch.testing.assert_close(torch.tensor(row["values"]), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("command", "options", "told"),
    [
        ("pretrain-critic", ["algorithm=grpo"], "algorithm.estimator has no critic"),
        ("pretrain-critic", ["learner.critic_pretraining.num_prompts=0"], "learner.critic_pretraining.num_prompts = 0"),
        ("train", ["learner.critic_pretraining.checkpoint=/nowhere"], "/nowhere/config.json cannot be read"),
        ("train", ["learner.critic_pretraining.checkpoint={model}"], "holds ['Qwen3ForCausalLM'], but a critic"),
    ],
)
def test_mistakes_are_told_before_anything_starts(
    tiny_model: Path, tmp_path: Path, command: str, options: list[str], told: str
) -> None:
    made = [option.format(model=tiny_model) for option in options]
    done = run(command, *overrides(tiny_model, tmp_path / "run", *made))
    assert done.returncode == 2 and told in done.stderr, done.stderr


def test_a_critic_is_not_overwritten(pretrained: Path, tiny_model: Path) -> None:
    done = run("pretrain-critic", *overrides(tiny_model, pretrained, *PRETRAINING))
    assert done.returncode == 2 and "holds a critic already" in done.stderr
