"""``sae-rl view``: a page of the responses of a recorded step, or of a folder of ``sae-rl correlate``."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import torch
import yaml

from sae_rl.analysis.step_columns import Column, recorded_columns
from sae_rl.analysis.viewer import SHOWN, Viewed, chosen, pass_score_of, view_of_step, write_page
from sae_rl.commands.arguments import Arguments
from sae_rl.commands.report import vocabulary_of
from sae_rl.commands.run_folder import CONFIG, check_run
from sae_rl.correlation.files import RESPONSES, TENSORS, load
from sae_rl.correlation.measurements import Measurements, block_advantages, reference_values
from sae_rl.correlation.references import value_noise
from sae_rl.records.rollouts import FOLDER, check_step, read_rollouts, step_files
from sae_rl.settings import ConfigError

MOST = 64  # responses of a page, unless --responses says otherwise; docs/runs.md has the size of such a page


def arguments_of(given: list[str]) -> argparse.Namespace:
    """Raises ConfigError for arguments that do not fit."""
    parser = Arguments(
        "sae-rl view", description="Writes one HTML page of responses, token by token; it needs no network."
    )
    parser.add_argument("folder", type=Path, help="a run, or what sae-rl correlate wrote")
    parser.add_argument("--step", type=int, help="a recorded step of the run; the last one unless given")
    parser.add_argument(
        "--response", help="the one to begin with: PROMPT_ID, PROMPT_ID/SAMPLE, or its index in the step"
    )
    parser.add_argument("--responses", type=int, default=MOST, help=f"responses of the page, {MOST} unless given")
    parser.add_argument(
        "--output", type=Path, help="the page; view.html or view_step_000012.html in FOLDER unless given"
    )
    found = parser.parse_args(given)
    if found.responses < 1:
        raise ConfigError([f"--responses {found.responses}: a page shows at least 1"])
    return found


def run_view(given: list[str]) -> Path:
    """Writes the page and returns its path. Raises ConfigError for arguments and folders that do not fit."""
    arguments = arguments_of(given)
    folder: Path = arguments.folder
    check_run(folder)
    is_correlated = (folder / TENSORS).is_file()
    if is_correlated and arguments.step is not None:
        raise ConfigError([f"--step {arguments.step}: {folder} is a folder of sae-rl correlate, which has no steps"])
    file = folder / RESPONSES if is_correlated else step_file(folder, arguments.step)
    text, config = config_of(folder / CONFIG)
    table = table_of(file)
    first = 0 if arguments.response is None else place_of(arguments.response, table)
    try:
        viewed = view_of_measurements(load(folder), table, config) if is_correlated else view_of_step(table, config)
    except ValueError as error:
        raise ConfigError([str(error)]) from error
    output: Path = arguments.output or folder / ("view.html" if is_correlated else f"view_{file.stem}.html")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError([f"--output {output}: cannot write there ({error.strerror})"]) from error
    write_page(
        viewed,
        chosen(viewed, arguments.responses, first),
        vocabulary_of(config["model"]["path"]),
        output,
        first=first,
        title=f"sae_rl: {config['name']}",
        source=str(file),
        config_text=text,
    )
    return output


def config_of(file: Path) -> tuple[str, dict[str, Any]]:
    """The text of ``config.yaml``, and what it holds. Raises ConfigError if a page's keys cannot be read from it."""
    try:
        text = file.read_text()
        config = yaml.safe_load(text)
        _ = config["name"], config["model"]["path"], pass_score_of(config)
    except (OSError, yaml.YAMLError, ValueError, KeyError, TypeError) as error:
        said = " ".join(str(error).split())
        raise ConfigError(
            [f"{file} cannot be read as a run's configuration ({type(error).__name__}: {said})"]
        ) from error
    return text, config


def table_of(file: Path) -> pa.Table:
    """Recorded responses. Raises ConfigError for a file that is damaged, empty, or lacks a column of the page."""
    try:
        check_step(file)
        table = read_rollouts(file)
    except (OSError, ValueError, pa.ArrowException) as error:
        said = " ".join(str(error).split())
        name = "" if str(file) in said else f"{file} holds no rollouts that can be read: "
        raise ConfigError([f"{name}{said}"]) from error
    if lacking := [name for name in ("prompt_token_ids", *SHOWN) if name not in table.column_names]:
        raise ConfigError([f"{file} lacks the columns {', '.join(lacking)}"])
    if not table.num_rows:
        raise ConfigError([f"{file} holds no responses"])
    return table


def view_of_measurements(measured: Measurements, table: pa.Table, config: Mapping[str, Any]) -> Viewed:
    """Responses on which estimators were compared with returns of continuations, and ``table`` with their rows."""
    kept = [column for column in recorded_columns(table, "") if column.kind not in ("advantage", "segments")]
    assert table.num_rows == measured.batch.num_responses, "the files of one folder belong together"
    values, k = reference_values(measured), measured.continued.shape[1]
    spread = value_noise(measured.continued).sqrt()
    nowhere = torch.full((measured.batch.num_tokens,), math.nan, dtype=torch.float64)
    segments = list[Column]()
    for name, opens in zip(measured.names, measured.opens, strict=True):
        if not any(torch.equal(opens, each.numbers) for each in segments):
            segments.append(Column("segments", f"segments of {name}", opens))
    return Viewed(
        table=table,
        columns=[
            *kept,
            Column("measured", f"mean return of {k} continuations", nowhere.index_copy(0, measured.places, values)),
            Column("deviation", "its standard error", nowhere.index_copy(0, measured.places, spread)),
            Column("advantage", "Monte-Carlo reference of blocks", block_advantages(measured, values)),
            *(Column("advantage", *pair) for pair in zip(measured.names, measured.advantages, strict=True)),
            *segments,
        ],
        notes=[],
        pass_score=pass_score_of(config),
    )


def step_file(folder: Path, step: int | None) -> Path:
    """The recording of a step, the last one unless given. Raises ConfigError if there is none."""
    files = dict(step_files(folder / FOLDER))
    if not files:
        raise ConfigError([f"{folder / FOLDER} holds no recorded step; set logger.rollouts_every_steps"])
    if step is not None and step not in files:
        raise ConfigError([f"--step {step} was not recorded, allowed: {', '.join(map(str, files))}"])
    return files[max(files) if step is None else step]


def place_of(response: str, table: pa.Table) -> int:
    """The row of ``PROMPT_ID``, ``PROMPT_ID/SAMPLE`` or an index; ids come first. Raises ConfigError if there is none."""
    rows = table.select(["prompt_id", "sample"]).to_pylist()
    for names in ([f"{row['prompt_id']}/{row['sample']}" for row in rows], [row["prompt_id"] for row in rows]):
        if response in names:
            return names.index(response)
    if response.isdecimal() and int(response) < len(rows):
        return int(response)
    raise ConfigError(
        [
            f"--response {response}: the step has the indices 0 to {len(rows) - 1}, and ids such as {rows[0]['prompt_id']}/0"
        ]
    )
