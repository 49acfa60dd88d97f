"""Reading the folders of runs and of sweeps."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import yaml

from sae_rl.comparison.curves import SUCCESS, TOKENS, TRAINING, Floats, RunCurves, is_curves, read_csv
from sae_rl.config.schema import flat
from sae_rl.records.failed_update import FAILED_UPDATE
from sae_rl.records.records import read_jsonl
from sae_rl.records.rollouts import step_files
from sae_rl.records.samples import FOLDER as SAMPLES

CONFIG, METRICS, FAILED_JOBS = "config.yaml", "metrics.jsonl", "failed_jobs.txt"
SAMPLING = ("pass_score", "temperature", "top_p", "top_k", "min_p")  # keys of `evaluation` that say what success means
DAMAGED = (KeyError, TypeError, ZeroDivisionError, AttributeError, ValueError, yaml.YAMLError)


@dataclass(frozen=True, slots=True)
class Unread:
    """A run without curves, and why it has none."""

    source: str
    reason: str


def read_runs(paths: Sequence[Path]) -> tuple[list[RunCurves], list[Unread]]:
    """The runs of folders, sweep folders and CSV files, each once, and the runs that left nothing to read.

    Raises:
        ValueError: a path does not exist or holds no run, or a CSV file cannot be read.
    """
    runs: dict[Path, RunCurves] = {}
    unread: dict[str, Unread] = {}
    for path in paths:
        found = _runs_below(path)
        failed = _failed_jobs(path) if path.is_dir() else {}
        if not found and not failed:
            raise ValueError(
                f"{path}: it holds no run and no CSV file of curves; name folders of runs, of sweeps or of CSV files"
                if path.exists()
                else f"{path}: there is no such folder or file"
            )
        for source in found:
            if source.resolve() in runs:
                continue
            tail = f"/{source.relative_to(path)}" if source != path else str(source)
            failure = "; ".join(failed.pop(name) for name in [*failed] if f"/{name}".endswith(tail))
            try:
                read = read_csv(source) if source.is_file() else _read_run(source, failure)
            except DAMAGED as error:
                if source.is_file():
                    raise
                reason = " ".join(str(error).split())
                read = Unread(str(source), f"it cannot be read ({type(error).__name__}: {reason})")
            if isinstance(read, Unread):
                unread[read.source] = read
            else:
                runs[source.resolve()] = read
        unread |= {name: Unread(name, reason) for name, reason in failed.items()}
    return list(runs.values()), list(unread.values())


def _runs_below(path: Path) -> list[Path]:
    """Folders of runs, but none inside another, and CSV files of curves."""
    if path.is_file() or (path / CONFIG).is_file():
        return [path] if path.is_file() or _is_of_training(path) else []
    files = [file for pattern in (CONFIG, "*.csv") for file in path.rglob(pattern) if file.is_file()]
    shown = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    runs = {file.parent for file in shown if file.name == CONFIG and _is_of_training(file.parent)}
    tops = [folder for folder in runs if runs.isdisjoint(folder.parents)]
    return sorted([*tops, *(file for file in shown if file.name != CONFIG and is_curves(file))])


def _is_of_training(folder: Path) -> bool:
    """Whether neither ``sae-rl correlate`` nor ``sae-rl pretrain-critic`` wrote the configuration."""
    has_critic_alone = (folder / "critic").is_dir() and not (folder / "checkpoints").is_dir()
    return not has_critic_alone and not (folder / "correlation.yaml").is_file()


def _failed_jobs(folder: Path) -> dict[str, str]:
    """What a sweep says about the runs that failed, by their folder or, before they had one, by their overrides."""
    file = folder / FAILED_JOBS
    lines = file.read_text().splitlines() if file.is_file() else []
    return dict(line.partition(": ")[::2] for line in lines)


def _read_run(folder: Path, failure: str) -> RunCurves | Unread:
    tree = yaml.safe_load((folder / CONFIG).read_text())
    if not isinstance(tree, dict) or not {"seed", "steps", "task", "algorithm"} <= tree.keys():
        return Unread(str(folder), f"its {CONFIG} is not that of a training run")
    rows = read_jsonl(folder / METRICS) if (folder / METRICS).is_file() else []
    training, evaluations = ({row["step"]: row for row in rows if row["phase"] == p} for p in ("train", "evaluation"))
    settings, done = flat(tree), 1 + max(training, default=-1)
    curves = {name: found for name in TRAINING if (found := _series(training, name))}
    prompts, scores = _prompt_scores(folder)
    return RunCurves(
        source=folder,
        seed=str(tree["seed"]),
        task=_task(tree),
        held_out=_held_out(tree),
        steps=int(tree["steps"]),
        problem="" if rows and done >= tree["steps"] else _problem(bool(rows), done, tree["steps"], failure),
        update_failed=done < tree["steps"] and (folder / FAILED_UPDATE).is_file(),
        prompts=prompts,
        training={**curves, TOKENS: _sampled_tokens(training, settings)},
        success=_series(evaluations, SUCCESS),
        scores=scores,
        settings=settings,
    )


def _problem(has_metrics: bool, done: int, steps: int, failure: str) -> str:
    found = f"{done} of {steps} steps" if has_metrics else f"no {METRICS}: it ended early, or logger.jsonl was false"
    return f"{found}; {failure}" if failure else found


def _series(rows: Mapping[int, Mapping[str, Any]], name: str) -> dict[int, float]:
    return {step: math.nan if row[name] is None else float(row[name]) for step, row in rows.items() if name in row}


def _sampled_tokens(rows: Mapping[int, Mapping[str, Any]], settings: Mapping[str, Any]) -> dict[int, float]:
    """Response tokens that each step sampled: those of responses that it trains on or discards, and continuations."""
    responses = settings["rollout.prompts_per_step"] * settings["rollout.group_size"]
    return {
        step: responses * row["rollout/tokens_mean"] / row.get("sampling/kept_fraction", 1.0)
        + row.get("values/continuation_tokens", 0.0)
        for step, row in rows.items()
        if row.get("rollout/tokens_mean") is not None
    }


def _prompt_scores(folder: Path) -> tuple[dict[str, int], dict[int, Floats]]:
    """The number of prompts of each data set, and (P,) the mean score of each prompt by evaluation; empty: not recorded."""
    sizes: dict[str, int] = {}
    scores: dict[int, Floats] = {}
    names: list[tuple[str, str]] = []
    for step, file in step_files(folder / SAMPLES):
        try:
            rows = pq.read_table(file, columns=["data_set", "prompt_id", "reward"])
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"{file} holds no samples that can be read: {error}") from error
        keys = ["data_set", "prompt_id"]
        table = rows.group_by(keys).aggregate([("reward", "mean")]).sort_by([(key, "ascending") for key in keys])
        found = list(zip(*(table[key].to_pylist() for key in keys), strict=True))
        if names and found != names:
            raise ValueError(f"{file} has other prompts than the first file in that folder")
        names, scores[step] = found, table["reward_mean"].to_numpy()
    for data_set, _ in names:
        sizes[data_set] = sizes.get(data_set, 0) + 1
    return sizes, scores


def _task(tree: Mapping[str, Any]) -> str:
    """The names of what a run trains on."""
    train = flat(tree["task"]["train"])
    named = [str(value) for key, value in train.items() if key.rpartition(".")[2] in ("name", "path") and value]
    return ", ".join(dict.fromkeys(named))


def _held_out(tree: Mapping[str, Any]) -> str:
    source = {
        key: value for key, value in flat(tree["task"]["evaluation"] or {}).items() if value not in (None, {}, [])
    }
    sampling = {key: tree["evaluation"][key] for key in SAMPLING}
    return " ".join(json.dumps(source | sampling, sort_keys=True).split())  # as CSV files hold it
