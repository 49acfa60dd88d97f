"""The records of a run, read back by json, TensorBoard's reader and pyarrow."""

from __future__ import annotations

import json
import math
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
import torch
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from sae_rl.backends.packing import build_micro_batch
from sae_rl.config.compose import CONF
from sae_rl.records.records import Jsonl, Records, Wandb, _wandb_mode, first_steps, read_jsonl
from sae_rl.records.rollouts import read_rollouts, read_step, step_files, write_rollouts
from sae_rl.types import Batch, Prompt, Rollout, Scores, StepRecord, Targets
from tests.evaluation.made_up import made_up

from .sample_run import make_config, step_record


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    config = make_config(tmp_path, "steps=5")
    with Records(config, tmp_path, first_step=0) as records:
        for epoch in range(4):
            records.log(epoch, {"pretraining/loss": 1.0 / (epoch + 1)}, phase="pretraining")
        for step in range(4):
            records.log(step, {"rollout/reward_mean": float(step)})
        for step in (0, 2, 4):
            records.log(step, {"evaluation/success_mean": 0.5}, phase="evaluation")
    with Records(config, tmp_path, first_step=2) as records:
        for step in (2, 3, 4):
            records.log(step, {"rollout/reward_mean": 10.0 + step})
    rows = rows_of(tmp_path)
    steps = [(row["step"], row["rollout/reward_mean"]) for row in rows if row["phase"] == "train"]
    assert steps == [(0, 0.0), (1, 1.0), (2, 12.0), (3, 13.0), (4, 14.0)]
    assert [row["step"] for row in rows if row["phase"] == "pretraining"] == [0, 1, 2, 3], "over before step 0"
    evaluated = [row["step"] for row in rows if row["phase"] == "evaluation"]
    assert evaluated == [0, 2], "the policy after 2 steps was evaluated before the checkpoint of step 2"
    with Records(config, tmp_path, first_step=0, resumed=True):
        kept = [(row["phase"], row["step"]) for row in rows_of(tmp_path)]
        assert kept == [("pretraining", epoch) for epoch in range(4)] + [("evaluation", 0)], "a checkpoint of step 0"
    with Records(config, tmp_path, first_step=0):
        assert rows_of(tmp_path) == [], "a run from the start leaves nothing of the one before"


def test_a_torn_last_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = '{"step": 0, "phase": "train", "rollout/reward_mean": 0.5}\n'
    path.write_text(whole + '{"step": 1, "phase": "train", "rollout/rew')
    assert [row["step"] for row in read_jsonl(path)] == [0]
    sink = Jsonl(path, first_steps(1, resumed=True))
    sink.log(1, {"rollout/reward_mean": 1.0}, "train")
    sink.close()
    assert [row["step"] for row in rows_of(tmp_path)] == [0, 1]
    path.write_text("{\n" + whole)
    with pytest.raises(ValueError, match="line 1 is no JSON"):
        read_jsonl(path)


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    with Records(make_config(tmp_path), tmp_path, first_step=0) as records:
        records.log(0, {"critic/explained_variance": math.nan, "critic/loss": math.inf, "rollout/tokens_max": 3})
    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert (row["critic/explained_variance"], row["critic/loss"], row["rollout/tokens_max"]) == (None, None, 3)
    assert row["phase"] == "train" and row["time"] > 1.7e9


def test_an_unknown_metric_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with Records(make_config(tmp_path), tmp_path, first_step=0) as records:
        with pytest.raises(AssertionError, match="rollout/typo"):
            records.log(0, {"rollout/typo": 1.0})
        assert rows_of(tmp_path) == []


def test_tensorboard_reads_the_same_numbers(tmp_path: Path) -> None:
    config = make_config(tmp_path, "logger.tensorboard=true", "steps=4")
    with Records(config, tmp_path, first_step=0) as records:
        records.log(7, {"pretraining/loss": 0.25}, phase="pretraining")
        for step in range(3):
            records.log(step, {"rollout/reward_mean": step / 4})
        for step in (2, 3):
            records.log(step, {"evaluation/success_mean": 0.5}, phase="evaluation")
    with Records(config, tmp_path, first_step=2) as records:
        for step in (2, 3):
            records.log(step, {"rollout/reward_mean": 1 + step / 4})
        records.log(4, {"evaluation/success_mean": 0.75}, phase="evaluation")

    def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
        events = EventAccumulator(str(folder))
        events.Reload()
        return [(event.step, event.value) for event in events.Scalars(name)]

    folder = tmp_path / "tensorboard"
    assert scalars(folder, "rollout/reward_mean") == [(0, 0.0), (1, 0.25), (2, 1.5), (3, 1.75)]
    assert scalars(folder / "evaluation", "evaluation/success_mean") == [(2, 0.5), (4, 0.75)]
    assert scalars(folder / "pretraining", "pretraining/loss") == [(7, 0.25)]


def test_parquet_keeps_ragged_lists(tmp_path: Path) -> None:
    record = step_record(3, num_prompts=3, skill=0.5, rng=random.Random(0))
    rollouts, scores, opens = record.rollouts, record.scores, record.opens
    batch = Batch.of(rollouts, record.rewards)
    config = make_config(tmp_path, "steps=10", "logger.rollouts_every_steps=3")
    with Records(config, tmp_path, first_step=0) as records:
        for step in (1, 3, 9):
            records.rollouts(replace(record, step=step))
    assert [step for step, _ in step_files(tmp_path / "rollouts")] == [3, 9], "every third step, and the last"
    assert [file.name for file in (tmp_path / "rollouts").iterdir() if "tmp" in file.name] == []
    rows = read_rollouts(tmp_path / "rollouts" / "step_000003.parquet").to_pylist()
    assert scores.values is not None
    for i, (row, rollout) in enumerate(zip(rows, rollouts, strict=True)):
        part = slice(int(batch.offsets[i]), int(batch.offsets[i + 1]))
        assert row["token_ids"] == rollout.token_ids.tolist()
        assert row["opens"] == opens[part].tolist() and row["opens"][0] is True
        returns = torch.full((batch.num_tokens,), record.rewards[i])
        for name, flat in (
            ("values", scores.values),
            ("returns", returns),
            ("advantages", record.targets.advantages),
        ):
            assert row[name] == pytest.approx(flat[part].tolist(), rel=1e-6)
        assert row["rollout_logprobs"] == rollout.rollout_logprobs.tolist()
        assert row["old_logprobs"] == pytest.approx(scores.old_logprobs[part].tolist(), rel=1e-6)
        assert (row["prompt_id"], row["prompt"], row["answer"]) == (
            rollout.prompt.id,
            rollout.prompt.text,
            rollout.prompt.answer,
        )
        assert (row["step"], row["sample"], row["response"]) == (3, rollout.sample, rollout.text)
        assert (row["reward"], row["why"]) == (record.rewards[i], record.reasons[i])
        assert (row["finish_reason"], row["temperature"]) == (rollout.finish_reason, 1.0)
        assert row["policy_versions"] == [3] * len(row["token_ids"])
    with Records(config, tmp_path, first_step=9):
        assert [step for step, _ in step_files(tmp_path / "rollouts")] == [3], "step 9 is sampled again"


def test_a_recording_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    """Columns had other names, and rewards had 32 bits."""
    record = step_record(2, num_prompts=2, skill=0.5, rng=random.Random(0))
    mask = torch.ones_like(record.rollouts[1].token_ids, dtype=torch.bool)
    mask[3] = False
    masked = [replace(r, action_mask=mask) if i == 1 else r for i, r in enumerate(record.rollouts)]
    file = write_rollouts(tmp_path, replace(record, rollouts=masked))
    rows = read_rollouts(file)
    earlier = {"action_mask": "sampled", "data_set": "task", "response": "text"}
    old = rows.rename_columns([earlier.get(name, name) for name in rows.column_names]).drop_columns("num_tokens")
    old = old.set_column(old.column_names.index("reward"), "reward", old["reward"].cast(pa.float32()))
    pq.write_table(old, file)
    assert {*earlier.values()} <= {*pq.read_table(file).column_names}
    rollouts, rewards, reasons = read_step(file)
    assert (rewards, reasons) == (record.rewards, record.reasons)
    for found, expected in zip(rollouts, masked, strict=True):
        assert (found.text, found.prompt) == (expected.text, expected.prompt)
        assert torch.equal(found.dense_action_mask, expected.dense_action_mask)
    assert [rollout.action_mask is None for rollout in rollouts] == [True, False, True, True]


def test_learners_are_sent_32_bit_ids_and_versions(tmp_path: Path) -> None:
    """Also from recordings with 64-bit columns."""
    record = step_record(2, num_prompts=2, skill=0.5, rng=random.Random(0))
    file = write_rollouts(tmp_path, record)
    rows = pq.read_table(file)
    for name in ("prompt_token_ids", "token_ids", "policy_versions"):
        wide = rows[name].cast(pa.large_list(pa.int64()))
        rows = rows.set_column(rows.column_names.index(name), name, wide)
    pq.write_table(rows, file)
    rollouts, rewards, _ = read_step(file)
    for batch in (Batch.of(rollouts, rewards), Batch.of(record.rollouts, record.rewards)):
        for ids in (batch.token_ids, batch.prompt_token_ids, batch.policy_versions):
            assert ids.dtype == torch.int32
        micro = build_micro_batch(batch, torch.arange(batch.num_responses))
        assert micro.input_ids.dtype == micro.token_ids.dtype == torch.int64, "what torch's layers index with"
        assert micro.token_ids.tolist() == [t for rollout in record.rollouts for t in rollout.token_ids.tolist()]


def test_parquet_without_a_critic_and_with_soft_segments(tmp_path: Path) -> None:
    record = step_record(0, num_prompts=1, skill=0.5, rng=random.Random(0))
    batch = Batch.of(record.rollouts, record.rewards)
    without_critic = replace(
        record,
        scores=replace(record.scores, values=None),
        targets=replace(record.targets, returns=None),
        monte_carlo_returns=None,
        opens=torch.full((batch.num_tokens,), 0.5),
    )
    rows = read_rollouts(write_rollouts(tmp_path, without_critic))
    assert (
        rows["values"].to_pylist() == rows["returns"].to_pylist() == [None, None]
        and rows["opens"].to_pylist()[1][0] == 0.5
    )
    assert rows["token_ids"].combine_chunks().flatten().to_pylist() == batch.token_ids.tolist()


def test_samples_of_evaluations_are_recorded_when_asked_for_and_dropped_with_what_is_done_again(tmp_path: Path) -> None:
    config = make_config(tmp_path, "steps=6", "evaluation.record_samples=true", "evaluation.samples_per_prompt=4")
    result = made_up(config)
    with Records(config, tmp_path, first_step=0) as records:
        for step in (0, 2, 4):
            records.samples(step, result.rollouts, result.rewards, result.opens)
    kept_apart = tmp_path / "evaluation" / "001_policy" / "samples.parquet"
    kept_apart.parent.mkdir()
    kept_apart.write_bytes(b"of sae-rl evaluate")
    assert [step for step, _ in step_files(tmp_path / "evaluation")] == [0, 2, 4]
    rows = pq.read_table(tmp_path / "evaluation" / "step_000002.parquet").to_pylist()
    assert [row["response"] for row in rows] == [r.text for r in result.rollouts]
    with Records(config, tmp_path, first_step=2):
        assert [step for step, _ in step_files(tmp_path / "evaluation")] == [0, 2], (
            "evaluated before the checkpoint of step 2"
        )
    with Records(config, tmp_path, first_step=0, resumed=True):
        assert [step for step, _ in step_files(tmp_path / "evaluation")] == [0]
    with Records(config, tmp_path, first_step=0):
        assert step_files(tmp_path / "evaluation") == [] and kept_apart.exists()
    with Records(make_config(tmp_path), tmp_path, first_step=0) as records:
        records.samples(0, result.rollouts, result.rewards, result.opens)
    assert step_files(tmp_path / "evaluation") == [], "not asked for"


def test_every_sink_takes_metrics_of_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[dict[str, float]] = []

    class Run:
        def define_metric(self, *_: object, **__: object) -> None: ...

        def log(self, row: dict[str, float]) -> None:
            logged.append(row)

        def finish(self) -> None: ...

    monkeypatch.setattr(wandb, "init", lambda **_: Run())
    config = make_config(tmp_path, "logger.tensorboard=true", "logger.jsonl=true", "logger.wandb=offline")
    metrics = made_up(config).metrics()
    name = "evaluation/hub/tales/success_mean"
    with Records(config, tmp_path, first_step=0) as records:
        records.log(3, metrics, phase="evaluation")
        records.log(2, {"pretraining/loss": 0.5}, phase="pretraining")
    assert rows_of(tmp_path)[0][name] == metrics[name] == logged[0][name]
    assert logged[0]["step"] == 3 and logged[1] == {"pretraining/loss": 0.5, "pretraining/epoch": 2}
    events = EventAccumulator(str(tmp_path / "tensorboard" / "evaluation"))
    events.Reload()
    assert [event.value for event in events.Scalars(name)] == pytest.approx([metrics[name]])


def test_plain_console_has_no_control_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Records(make_config(tmp_path, "logger.console=rich", "steps=20"), tmp_path, first_step=0) as records:
        records.note("training starts [here]")
        records.log(0, {"pretraining/loss": 0.5}, phase="pretraining")
        records.log(9, {"rollout/reward_mean": 0.4123, "policy/approx_kl": math.nan, "time/step_s": 1.0})
        records.log(10, {"evaluation/success_mean": 0.5}, phase="evaluation")
    out = capsys.readouterr().out
    assert "\x1b" not in out and "training starts [here]\n" in out
    assert "critic pre-training, epoch 0  loss 0.500" in out and "step  9  reward  0.412  kl     nan" in out
    assert "1.0 s" in out and "step 10  held-out success 0.500" in out
    with Records(make_config(tmp_path, "logger.console=off"), tmp_path, first_step=0) as records:
        records.note("nothing")
        records.log(0, {"rollout/reward_mean": 0.4})
    assert capsys.readouterr().out == ""


def test_wandb_is_online_only_with_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert _wandb_mode("auto") == "offline"
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {40 * 'k'}\n")
    (tmp_path / "netrc").chmod(0o600)
    assert _wandb_mode("auto") == "online" and _wandb_mode("offline") == "offline"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert _wandb_mode("auto") is None, "wandb's own variable decides"


def test_wandb_reads_its_own_environment_where_a_key_is_null(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With wandb's own settings, made from the environment as its users do."""
    environment = {
        "PROJECT": "p",
        "NAME": "n",
        "RUN_GROUP": "g",
        "TAGS": "a,b",
        "NOTES": "o",
        "ENTITY": "e",
        "DIR": "d",
    }
    for name, value in environment.items():
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path / value) if name == "DIR" else value)
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.teardown()  # it reads the environment once
    (tmp_path / "d").mkdir()

    def settings_of(*overrides: str) -> Any:
        folder = tmp_path / f"run{len(overrides)}"
        with Records(
            make_config(folder, "logger.wandb.mode=auto", "logger.console=off", *overrides), folder, 0
        ) as records:
            (sink,) = (sink for sink in records._sinks if isinstance(sink, Wandb))
            return sink._run.settings.model_copy()

    plain = settings_of()
    names = ("project", "run_name", "run_group", "run_tags", "run_notes", "entity")
    assert [getattr(plain, name) for name in names] == ["p", "n", "g", ("a", "b"), "o", "e"]
    assert plain.root_dir == str(tmp_path / "d") and plain.run_id == (tmp_path / "run0" / "wandb_id").read_text()
    keys = [f"logger.wandb.{key}={value}" for key, value in {"name": "mine", "group": "own", "tags": "[c]"}.items()]
    chosen = settings_of(*keys)
    assert [getattr(chosen, name) for name in names] == ["p", "mine", "own", ("c",), "o", "e"]
    for name in environment:
        monkeypatch.delenv(f"WANDB_{name}")
    wandb.teardown()
    bare = settings_of("name=demo")
    assert (bare.project, bare.run_name, bare.run_group, bare.run_tags) == ("sae-rl", "demo", None, None)
    wandb.teardown()


def test_a_failing_wandb_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Failing:
        def define_metric(self, *_: object, **__: object) -> None: ...

        def log(self, _: object) -> None:
            raise wandb.errors.CommError("no route")

        def finish(self) -> None:
            raise AssertionError("not asked after it failed")

    asked: dict[str, Any] = {}
    monkeypatch.setattr(wandb, "init", lambda **settings: asked.update(settings) or Failing())
    config = make_config(tmp_path, "logger.wandb=offline", "logger.console=plain")
    for _ in range(2):
        with Records(config, tmp_path, first_step=0) as records:
            records.log(0, {"rollout/reward_mean": 0.5})
            records.log(1, {"rollout/reward_mean": 0.5})
        assert capsys.readouterr().out.count("wandb failed and is off from here on") == 1
        assert len(rows_of(tmp_path)) == 2
        assert asked["id"] == (tmp_path / "wandb_id").read_text()
    assert asked["mode"] == "offline" and asked["resume"] == "allow"
    assert asked["config"]["algorithm"]["segmenter"] == {
        "name": "low_probability",
        "p": 0.3,
        "boundary": "opens",
        "every": 1,
    }

    class Foreign(Failing):
        def log(self, _: object) -> None:
            raise KeyError("not wandb's")

        def finish(self) -> None: ...

    monkeypatch.setattr(wandb, "init", lambda **_: Foreign())
    with pytest.raises(KeyError), Records(config, tmp_path, first_step=0) as records:
        records.log(0, {"rollout/reward_mean": 0.5})


def full_length_step(num_responses: int, length: int, vocabulary: int) -> StepRecord:
    """Responses of frequent and rare words, with numbers that do not repeat."""
    draw = torch.Generator().manual_seed(0)
    ids = (vocabulary ** torch.rand(num_responses, length, generator=draw)).long()  # frequencies fall as 1 / rank
    prompt = Prompt(id="0", text="question " * 50, token_ids=tuple(range(200)), answer="1", task="math", reward="math")
    rollouts = [
        Rollout(
            prompt=prompt,
            sample=i,
            token_ids=ids[i],
            rollout_logprobs=-torch.rand(length, generator=draw).square(),
            text=" ".join(f"{number:x}" for number in ids[i].tolist()),
            finish_reason="length",
            policy_versions=torch.full((length,), 7),
            temperature=1.0,
        )
        for i in range(num_responses)
    ]
    batch = Batch.of(rollouts, [0.0] * num_responses)
    numbers = torch.randn(3, batch.num_tokens, generator=draw)
    old_logprobs = batch.rollout_logprobs + 0.01 * numbers[0]
    return StepRecord(
        step=0,
        rollouts=rollouts,
        rewards=[0.0] * num_responses,
        reasons=["wrong"] * num_responses,
        opens=old_logprobs.exp() < 0.2,
        scores=Scores(old_logprobs=old_logprobs, values=0.5 + 0.1 * numbers[1], ref_logprobs=None),
        targets=Targets(advantages=numbers[2], returns=numbers[2]),
    )


def test_a_step_of_paper_size_takes_what_its_recipe_says(tmp_path: Path) -> None:
    """Bytes per token of a recorded step, times the tokens of 512 x 8 responses of full length."""
    record = full_length_step(num_responses=16, length=4096, vocabulary=151_936)
    file = write_rollouts(tmp_path, record)
    gigabytes = file.stat().st_size / (16 * 4096) * 512 * 8 * 8192 / 1e9
    said = [re.search(r"take ([\d.]+) GB", recipe.read_text()) for recipe in CONF.glob("experiment/paper_*.yaml")]
    assert {float(match[1]) if match else None for match in said} == {round(gigabytes, 1)}, gigabytes
    rollouts, _, _ = read_step(file)
    assert torch.equal(rollouts[3].rollout_logprobs, record.rollouts[3].rollout_logprobs)
