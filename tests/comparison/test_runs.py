"""Folders of runs and of sweeps are read as they were recorded, and CSV files hold the same numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from sae_rl.comparison.curves import FIRST_LINE, SUCCESS, RunCurves, csv_text, read_csv
from sae_rl.comparison.runs import read_runs
from sae_rl.records.samples import write_samples
from tests.evaluation.made_up import made_up
from tests.evaluation.made_up import make_config as evaluation_config

from .made_up import EVERY, STEPS, curves_of, write_run


def read_one(path: Path) -> RunCurves:
    (run,), unread = read_runs([path])
    assert unread == []
    return run


def why_unread(folder: Path) -> str:
    """Why a run is not read; the run beside it is."""
    beside = folder.parent / "beside"
    (run,), (unread,) = read_runs([beside if beside.exists() else write_run(beside, seed=9), folder])
    assert (run.seed, unread.source) == ("9", str(folder))
    return unread.reason


def test_a_run_is_read_as_it_was_recorded(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", "algorithm=gae", seed=7, num_prompts=6)
    run = read_one(folder)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert run.success == {row["step"]: row[SUCCESS] for row in rows if row["phase"] == "evaluation"}
    assert [*run.success] == [*range(0, STEPS + 1, EVERY)]
    train = [row for row in rows if row["phase"] == "train"]
    assert run.training["critic/explained_variance"] == {row["step"]: row["critic/explained_variance"] for row in train}
    assert np.isnan(run.training["policy/grad_norm"][0]) and run.training["policy/grad_norm"][1] > 0
    responses = run.settings["rollout.prompts_per_step"] * run.settings["rollout.group_size"]
    assert run.training["sampled_tokens"][3] == responses * 256.0
    assert (run.seed, run.task, run.steps, run.problem, run.update_failed) == ("7", "level", STEPS, "", False)
    assert run.prompts == {"level": 3, "other": 3} or run.prompts == {"other": 3, "level": 3}
    assert all(run.scores[step].mean() == pytest.approx(run.success[step]) for step in run.success)
    assert run.settings["algorithm.estimator.name"] == "gae"


def test_continuations_and_discarded_responses_are_sampled_tokens(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    file = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:
        row |= {"sampling/kept_fraction": 0.5, "values/continuation_tokens": 1000.0} if row["phase"] == "train" else {}
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = read_one(folder)
    responses = run.settings["rollout.prompts_per_step"] * run.settings["rollout.group_size"]
    assert run.training["sampled_tokens"][0] == responses * 250.0 / 0.5 + 1000


def test_samples_that_an_evaluation_records_are_read(tmp_path: Path) -> None:
    folder, result = write_run(tmp_path / "run"), made_up(evaluation_config(tmp_path))
    write_samples(folder / "evaluation" / "step_000003.parquet", result.rollouts, result.rewards, result.opens)
    run = read_one(folder)
    by_prompt: dict[tuple[str, str], list[float]] = {}
    for rollout, score in zip(result.rollouts, result.rewards.scores, strict=True):
        by_prompt.setdefault((rollout.prompt.task, rollout.prompt.id), []).append(score)
    assert run.scores[3] == pytest.approx([np.mean(by_prompt[key]) for key in sorted(by_prompt)])
    assert run.prompts == {"hub/tales": 4, "sums": 6}


def test_a_sweep_counts_what_failed(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    write_run(sweep / "seed=0")
    write_run(sweep / "algorithm" / "segmenter=random,seed=1")
    (sweep / "seed=0" / ".hydra").mkdir()
    (sweep / "seed=0" / ".hydra" / "config.yaml").write_text("seed: 0\n")
    stopped = write_run(sweep / "seed=2", seed=2, done=5)
    (stopped / "failed_update.pt").write_bytes(b"")
    early = write_run(sweep / "seed=3", seed=3, done=0)
    (early / "metrics.jsonl").unlink()
    lines = ["/elsewhere/sweep/seed=2: the update of step 5 failed", "seed=-1: seed: must not be negative"]
    (sweep / "failed_jobs.txt").write_text("\n".join(lines) + "\n")
    (sweep / "base").mkdir()
    (sweep / "base" / "config.yaml").write_text("a: 1\n")
    runs, unread = read_runs([sweep, sweep / "seed=0"])
    problems = {run.source.name: run.problem for run in runs}
    assert problems == {
        "seed=0": "",
        "segmenter=random,seed=1": "",
        "seed=2": f"5 of {STEPS} steps; the update of step 5 failed",
        "seed=3": "no metrics.jsonl: it ended early, or logger.jsonl was false",
    }
    assert {run.source.name for run in runs if run.update_failed} == {"seed=2"}
    assert [(run.source, run.reason) for run in unread] == [
        (str(sweep / "base"), "its config.yaml is not that of a training run"),
        ("seed=-1", "seed: must not be negative"),
    ]


def test_what_other_commands_write_is_no_run(tmp_path: Path) -> None:
    run, alone, critic = (write_run(tmp_path / "all" / name) for name in ("run", "alone", "critic"))
    measured = write_run(run / "correlation" / "step_000012", done=0)
    (critic / "critic").mkdir()
    for folder in (measured, alone):
        (folder / "correlation.yaml").write_text("correlation: {}\n")
    assert read_one(tmp_path / "all").source == run
    for folder in (alone, critic):
        with pytest.raises(ValueError, match="it holds no run"):
            read_runs([folder])
    (critic / "checkpoints").mkdir()
    assert read_one(critic).source == critic, "a run that was trained where its critic lies"


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("config.yaml", "", "its config.yaml is not that of a training run"),
        ("config.yaml", "a: [1,\n", "it cannot be read (ParserError: while parsing a flow node"),
        ("config.yaml", "{seed: 0, steps: 2, task: {}, algorithm: {}}", "it cannot be read (KeyError: "),
        ("metrics.jsonl", '{"phase": "train"}\n', "it cannot be read (KeyError: 'step')"),
        ("metrics.jsonl", "3\n", "it cannot be read (TypeError: "),
        (
            "metrics.jsonl",
            '{"phase": "train", "step": 0, "rollout/tokens_mean": 1, "sampling/kept_fraction": null}\n',
            "it cannot be read (TypeError: ",
        ),
        (
            "metrics.jsonl",
            '{"phase": "train", "step": 0, "rollout/tokens_mean": 1, "sampling/kept_fraction": 0}\n',
            "it cannot be read (ZeroDivisionError: ",
        ),
    ],
)
def test_a_damaged_run_does_not_end_the_comparison(tmp_path: Path, name: str, text: str, reason: str) -> None:
    folder = write_run(tmp_path / "run")
    (folder / name).write_text(text)
    assert reason in why_unread(folder)


def test_a_folder_with_the_name_of_a_csv_file(tmp_path: Path) -> None:
    run = write_run(tmp_path / "all" / "run")
    (tmp_path / "all" / "x.csv").mkdir()
    assert read_one(tmp_path / "all").source == run


def test_folders_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere: there is no such folder or file"):
        read_runs([tmp_path / "nowhere"])
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"it holds no run and no CSV file of curves; name folders of runs, of sweeps"):
        read_runs([tmp_path])
    with pytest.raises(ValueError, match=r"other\.csv holds no curves: its first line is not"):
        read_runs([tmp_path / "other.csv"])


def test_samples_that_do_not_fit_together(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", num_prompts=4)
    file = folder / "evaluation" / "step_000003.parquet"
    other = write_run(tmp_path / "other", num_prompts=6) / "evaluation" / "step_000003.parquet"
    file.write_bytes(other.read_bytes())
    assert "step_000003.parquet has other prompts than the first file in that folder" in why_unread(folder)
    file.write_bytes(b"cut")
    assert "step_000003.parquet holds no samples that can be read" in why_unread(folder)


@pytest.mark.parametrize("num_prompts", [0, 5])
def test_a_csv_file_holds_the_same_run(tmp_path: Path, num_prompts: int) -> None:
    run = replace(
        read_one(write_run(tmp_path / "run", num_prompts=num_prompts)),
        arm="lam=0.8, p=0.3",
        problem="5 of 12 steps:\nit failed",
    )
    file = tmp_path / "run.csv"
    file.write_text(csv_text(run))
    found = read_one(file)
    assert file.read_text().startswith(f"{FIRST_LINE}\n# arm: lam=0.8, p=0.3\n# seed: 0\n# task: level\n")
    for name in ("arm", "seed", "task", "held_out", "steps", "update_failed", "prompts"):
        assert getattr(found, name) == getattr(run, name), name
    assert found.problem == "5 of 12 steps: it failed"
    assert found.success == pytest.approx(run.success, rel=1e-5) and found.settings == {}
    assert {step: scores.tolist() for step, scores in found.scores.items()} == {
        step: pytest.approx(scores.tolist()) for step, scores in run.scores.items()
    }
    assert found.training.keys() == run.training.keys()
    for name, series in run.training.items():
        assert dict(found.training[name]) == pytest.approx(dict(series), rel=1e-5, nan_ok=True), name


def test_a_csv_file_that_was_changed(tmp_path: Path) -> None:
    file = tmp_path / "run.csv"
    text = csv_text(read_one(write_run(tmp_path / "run", num_prompts=5)))
    for old, new, message in [
        ("# steps: 12\n", "", r"lacks the head lines # steps: \.\.\."),
        ("evaluation,3,", "evaluation,three,", "holds no curves that can be read: ValueError"),
        ('"level": 3', '"level": 2', "5 scores for 4 prompts"),
        ("phase,step", "phase,stage", "holds no curves that can be read: KeyError"),
    ]:
        assert old in text
        file.write_text(text.replace(old, new))
        with pytest.raises(ValueError, match=message):
            read_csv(file)


def test_scores_of_many_prompts_are_read(tmp_path: Path) -> None:
    scores, file = np.full(20_000, 1 / 3), tmp_path / "run.csv"
    run = curves_of({0: 0.1, 2: 1 / 3}, prompts={"level": 20_000}, scores={2: scores})
    file.write_text(csv_text(run))
    assert read_one(file).scores[2] == pytest.approx(scores, rel=1e-5)
    file.write_text(file.read_text().replace("evaluation,0", 'evaluation,"0'))
    with pytest.raises(ValueError, match="holds no curves that can be read"):
        read_csv(file)


def test_blanks_do_not_tell_held_out_prompts_apart(tmp_path: Path) -> None:
    folder, file = write_run(tmp_path / "run"), tmp_path / "run.csv"
    tree = yaml.safe_load((folder / "config.yaml").read_text())
    tree["task"]["evaluation"]["template"] = "two  blanks"
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    run = read_one(folder)
    file.write_text(csv_text(run))
    assert read_one(file).held_out == run.held_out
