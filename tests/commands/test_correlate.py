"""What ``sae-rl correlate`` refuses and outlines, before anything starts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from sae_rl import checkpoint
from sae_rl.algo.estimators import GAE, SAE
from sae_rl.algo.segmenters import FixedLength
from sae_rl.commands.correlate import FOLDER, load_correlation, run_correlation
from sae_rl.commands.model_files import load_tokenizer
from sae_rl.commands.prompts import load_task
from sae_rl.config.compose import load_config
from sae_rl.config.schema import as_tree
from sae_rl.digests import digest
from sae_rl.settings import ConfigError
from tests.conftest import CommandLine


def write_run(folder: Path, model: Path, *overrides: str, step: int = 2) -> Path:
    """What a run leaves that `correlate` reads before it starts anything."""
    config = load_config([f"model.path={model}", "rollout.max_response_tokens=64", *overrides])
    saved = folder / "checkpoints" / f"step_{step:06d}"
    roles = ["policy", *(["critic"] if config.algorithm.needs_critic else [])]
    for role in roles:
        (saved / role).mkdir(parents=True)
        (saved / role / "random_state_0.pt").touch()
    sampler, _ = load_task(config, lambda: load_tokenizer(str(model)))
    (saved / "driver.json").write_text(json.dumps({"step": step, "sampler": sampler.state()}))
    checkpoint.write_manifest(saved, {"driver.json": digest(saved / "driver.json")})
    (folder / "config.yaml").write_text(yaml.safe_dump(as_tree(config)))
    return folder


@pytest.fixture
def run(tmp_path: Path, tiny_model: Path) -> Path:
    return write_run(tmp_path / "run", tiny_model, "seed=5", "algorithm=sae_short")


def test_the_runs_own_configuration_counts_under_the_overrides(run: Path) -> None:
    given = [f"correlation.checkpoint={run}", "rollout.temperature=0.7", "algorithm/segmenter=fixed_length"]
    config, settings, own = load_correlation([*given, "correlation.k=2", "correlation.estimators.soft=null"])
    assert config.seed == 5 and config.algorithm.estimator == SAE(lam=0.8), "recorded"
    assert config.rollout.temperature == 0.7 and config.algorithm.segmenter == FixedLength(100), "overridden"
    assert config.algorithm.token_rewards.max_response_tokens == 64, "recorded, where the default is another number"
    assert settings.k == 2 == own["correlation"]["k"] and settings.estimators["soft"] is None
    assert config.output_dir == run / FOLDER / "step_000002"
    assert settings.checkpoint == run / "checkpoints" / "step_000002"
    other, _, _ = load_correlation([f"correlation.checkpoint={run}", "algorithm=gae", "rollout.max_response_tokens=32"])
    assert other.algorithm.estimator == GAE(lam=0.95) and other.algorithm.token_rewards.max_response_tokens == 32
    again, _, _ = load_correlation([f"correlation.checkpoint={run}/checkpoints/step_000002", f"output_dir={run}/mine"])
    assert again.output_dir == run / "mine"


def test_the_newest_checkpoint_counts(run: Path) -> None:
    (run / "checkpoints" / "step_000002").rename(run / "checkpoints" / "step_000010")
    config, _, _ = load_correlation([f"correlation.checkpoint={run}"])
    assert config.output_dir.name == "step_000010"


def test_a_dry_run_says_what_would_be_measured(run: Path, sae_rl: CommandLine) -> None:
    done = sae_rl("correlate", f"correlation.checkpoint={run}", "dry_run=true")
    assert done.code == 0, done.stderr
    assert "1 policy, 1 critic, on cpu" in done.stdout
    assert "left out: delimiter" in done.stdout
    assert f"tokens: at most {64 * 8 * 64:,} of responses and {64 * 8 * 16 * 32 * 8:,} of continuations" in done.stdout
    assert not (run / FOLDER).exists()


def test_without_a_critic_a_note_names_what_is_left_out(tmp_path: Path, tiny_model: Path, sae_rl: CommandLine) -> None:
    run = write_run(tmp_path / "grpo", tiny_model, "algorithm=grpo_token_mean")
    done = sae_rl("correlate", f"correlation.checkpoint={run}", "dry_run=true")
    assert done.code == 0, done.stderr
    assert "left out, since this run has no critic: sae, sae_p10" in done.stdout
    assert "1 policy, on cpu" in done.stdout


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["correlation.k=0"], "error: correlation.k: found 0"),
        (["correlation.kk=3"], "error: correlation has no 'kk', did you mean 'k'?"),
        (["correlation.estimators.gae.estimator.lam=2"], "error: correlation.estimators.gae.estimator: "),
        (["correlation.boundaries=[say]"], "error: correlation.boundaries = say: no estimator has this name"),
        (["correlation.num_prompts=999"], "error: correlation.num_prompts = 999, but task.evaluation has 256 prompts"),
        (
            ["learner.policy.zero_stage=3"],
            "error: correlation.gradient_dimension = 8192: under learner.policy.zero_stage = 3",
        ),
        (
            ["algorithm.token_rewards.kl_coef=0.1"],
            "error: algorithm.token_rewards.kl_coef > 0: continuations have no KL",
        ),
        (["algorithm.estimator.gamma=0.9"], "error: algorithm.estimator.gamma = 0.9: returns of continuations are"),
        (
            ["+correlation.estimators.mine={estimator: {name: sae, gamma: 0.5}}"],
            "error: correlation.estimators.mine.estimator.gamma = 0.5: returns of continuations are undiscounted; use 1",
        ),
        (
            ["rollout.first_responses=2"],
            "error: rollout.first_responses = 2: no response branches from another here; override it with null",
        ),
        (
            ["correlation.responses_per_prompt=1"],
            "error: correlation.estimators.grpo: correlation.responses_per_prompt is 1",
        ),
        (["algorithm.bootstrap_truncated=true"], "error: algorithm.bootstrap_truncated = true: continuations count"),
        (
            ["experiment=demo"],
            "error: experiment=demo: a recorded configuration takes key=value and GROUP=option alone",
        ),
        (["steps=x"], "error: steps: found 'x'"),
        (["sead=1"], "error: sead: the configuration has no 'sead', did you mean"),
    ],
)
def test_a_mistake_is_told_in_a_sentence(run: Path, sae_rl: CommandLine, overrides: list[str], said: str) -> None:
    done = sae_rl("correlate", f"correlation.checkpoint={run}", *overrides)
    assert done.code == 2 and done.stderr.startswith(said), done.stderr
    assert not (run / FOLDER).exists()


def test_a_folder_without_a_checkpoint_is_told(
    run: Path, sae_rl: CommandLine, tiny_model: Path, tmp_path: Path
) -> None:
    assert "no run wrote into it" in sae_rl("correlate", f"correlation.checkpoint={run.parent}").stderr + (
        sae_rl("correlate", f"correlation.checkpoint={tiny_model}").stderr
    )
    (run / "checkpoints" / "step_000002").rename(tmp_path / "elsewhere")
    assert "the run has no intact checkpoint" in sae_rl("correlate", f"correlation.checkpoint={run}").stderr
    done = sae_rl("correlate", f"model.path={tiny_model}", "rollout.max_response_tokens=64")
    assert done.code == 2 and done.stderr.startswith(
        "error: the critic is not trained: name a run in correlation.checkpoint"
    )


def test_a_folder_with_other_settings_is_refused(run: Path) -> None:
    config, _, own = load_correlation([f"correlation.checkpoint={run}"])
    folder = config.output_dir
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(as_tree(config)))
    (folder / "correlation.yaml").write_text(yaml.safe_dump(own))
    (folder / "measurements.safetensors").touch()
    free = [f"correlation.checkpoint={run}", "cluster.call_timeout_s=7", "rewards.num_processes=2"]
    assert run_correlation(*load_correlation(free)) == folder, "measured already"
    for override, told in (
        ("correlation.k=3", "correlation.k: 8 -> 3"),
        ("seed=6", "seed: 5 -> 6"),
        ("correlation.estimators.gae.estimator.lam=0.9", "correlation.estimators.gae.estimator.lam: 0.95 -> 0.9"),
    ):
        with pytest.raises(ConfigError, match=r"holds measurements with other settings") as error:
            run_correlation(*load_correlation([f"correlation.checkpoint={run}", override]))
        assert told in str(error.value) and "choose another output_dir" in str(error.value)


def test_a_runs_own_folder_is_refused(run: Path) -> None:
    before = (run / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=r"output_dir = .*run holds a run; choose another output_dir"):
        run_correlation(*load_correlation([f"correlation.checkpoint={run}", f"output_dir={run}"]))
    assert (run / "config.yaml").read_text() == before


def test_other_weights_in_the_same_place_are_refused(run: Path, tiny_model: Path, tmp_path: Path) -> None:
    def begin(*overrides: str) -> None:
        config, _, own = load_correlation(overrides)
        config.output_dir.mkdir(parents=True)
        (config.output_dir / "config.yaml").write_text(yaml.safe_dump(as_tree(config)))
        (config.output_dir / "correlation.yaml").write_text(yaml.safe_dump(own))

    begin(given := f"correlation.checkpoint={run}")
    saved = run / "checkpoints" / "step_000002"
    (saved / "policy" / "random_state_0.pt").write_text("another run's")
    files = ("driver.json", "policy/random_state_0.pt")
    checkpoint.write_manifest(saved, {name: digest(saved / name) for name in files})
    with pytest.raises(
        ConfigError, match=r"with other settings: weights\.correlation\.checkpoint: '\w{64}' -> '\w{64}';"
    ):
        run_correlation(*load_correlation([given]))
    critic = tmp_path / "critic"
    shutil.copytree(tiny_model, critic)
    start = [f"model.path={tiny_model}", "rollout.max_response_tokens=64", f"output_dir={tmp_path / 'start'}"]
    start += [f"learner.critic_pretraining.checkpoint={critic}"]
    begin(*start)
    weights = critic / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ConfigError, match=r"weights\.learner\.critic_pretraining\.checkpoint: ") as error:
        run_correlation(*load_correlation(start))
    assert "weights.model.path" not in str(error.value)


def test_paths_of_one_checkpoint_are_the_same(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = run / "checkpoints" / "step_000002"
    expected = load_correlation([f"correlation.checkpoint={saved}"])
    for folder, path in ((run.parent, "run"), (run, "."), (run / "checkpoints", "step_000002")):
        monkeypatch.chdir(folder)
        config, settings, own = load_correlation([f"correlation.checkpoint={path}"])
        assert (config.output_dir, settings.checkpoint) == (expected[0].output_dir, saved), path
        assert own["correlation"] | {"checkpoint": None} == expected[2]["correlation"] | {"checkpoint": None}


def test_a_checkpoint_outside_of_a_run_is_told(run: Path, tmp_path: Path) -> None:
    (tmp_path / "copied").mkdir()
    moved = (run / "checkpoints" / "step_000002").rename(tmp_path / "copied" / "step_000002")
    with pytest.raises(ConfigError, match=r"run.*no config\.yaml|holds the runs"):
        load_correlation([f"correlation.checkpoint={moved}"])


def test_a_damaged_checkpoint_is_told(sae_rl: CommandLine, run: Path) -> None:
    saved = run / "checkpoints" / "step_000002" / "driver.json"
    saved.write_text(saved.read_text() + " ")
    told = f"error: correlation.checkpoint = {saved.parent} is damaged: driver.json has"
    assert told in sae_rl("correlate", f"correlation.checkpoint={saved.parent}").stderr
    assert "the run has no intact checkpoint" in sae_rl("correlate", f"correlation.checkpoint={run}").stderr
