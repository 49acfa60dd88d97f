"""The page of an evaluation: its numbers, and its samples to read and filter, in one HTML file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from sae_rl.analysis.evaluation_table import extent, rows_of, summaries_of
from sae_rl.analysis.pages import render
from sae_rl.analysis.responses import DecodeText, split_at
from sae_rl.evaluation.files import PAGE, SAMPLES, SUMMARY
from sae_rl.records.samples import read_samples

MAX_SIZE = 12_000_000  # estimated characters of the page
SIZE_OF_SAMPLE, SIZE_OF_TOKEN = 500, 4  # characters of markup

Row = dict[str, Any]  # a sample in samples.parquet


def write_samples_page(folder: Path, decode: DecodeText) -> Path:
    """Writes ``samples.html`` beside the summary and the samples that `write_evaluation` wrote.

    Args:
        decode: token ids to text without special tokens, to find where in a response segments open.
    """
    evaluation = json.loads((folder / SUMMARY).read_text())
    rows = read_samples(folder / SAMPLES).to_pylist()
    prompts = [list(group) for _, group in groupby(rows, key=lambda row: (row["data_set"], row["prompt_id"]))]
    shown = within_limits(prompts)
    summaries = summaries_of(evaluation)
    tables = {title: rows_of(summary) for title, summary in summaries.items()}
    page = render(
        "samples.html.j2",
        title=f"Evaluation of {evaluation['model']}",
        evaluation=evaluation,
        tables=tables,
        labels=list(dict.fromkeys(label for table in tables.values() for label in table)),
        extents={title: extent(summary) for title, summary in summaries.items()},
        prompts=[[_sample(row, evaluation["pass_score"], decode) for row in samples] for samples in shown],
        num_prompts=Counter(samples[0]["data_set"] for samples in prompts),
        prompts_shown=Counter(samples[0]["data_set"] for samples in shown),
        num_samples=len(rows),
        num_shown=sum(map(len, shown)),
        samples_file=SAMPLES,
    )
    target = folder / PAGE
    target.write_text(page)
    return target


def within_limits(prompts: Sequence[list[Row]]) -> list[list[Row]]:
    """The samples of the first prompts of every data set in turn, until the page is full; in the order of the file."""
    earlier = Counter[str]()
    turns = []
    for number, samples in enumerate(prompts):
        turns.append((earlier[samples[0]["data_set"]], number))
        earlier[samples[0]["data_set"]] += 1
    kept, size = list[int](), 0
    for _, number in sorted(turns):
        size += size_of(prompts[number])
        if kept and size > MAX_SIZE:
            break
        kept.append(number)
    return [prompts[number] for number in sorted(kept)]


def size_of(samples: Sequence[Row]) -> int:
    """Estimated characters of a prompt and its samples on the page."""
    size: int = len(samples[0]["prompt"])
    for row in samples:
        size += len(row["response"]) + len(row["why"]) + SIZE_OF_SAMPLE + SIZE_OF_TOKEN * row["num_tokens"]
    return size


def _sample(row: Row, pass_score: float, decode: DecodeText) -> Row:
    """A row, with its status and its segments."""
    opens = row["opens"]
    text = row["response"]
    return row | {
        "status": "failed" if row["failed"] else "right" if row["score"] >= pass_score else "wrong",
        "num_segments": None if opens is None else sum(weight >= 0.5 for weight in opens),
        "segments": [text] if opens is None else split_at(text, row["token_ids"], opens, decode),
    }
