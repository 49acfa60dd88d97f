"""The page of an evaluation: its numbers, and its samples to read and filter, in one HTML file."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import accumulate, count, groupby, pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq  # type: ignore[import-untyped]

from sae_rl.analysis.evaluation_table import extent, rows_of, summaries_of
from sae_rl.analysis.pages import render
from sae_rl.analysis.token_texts import DecodeText, TokenTexts
from sae_rl.evaluation.files import PAGE, SAMPLES, SUMMARY

MAX_SIZE = 12_000_000  # estimated characters of the page
SIZE_OF_SAMPLE, SIZE_OF_TOKEN = 500, 4  # characters of markup

Row = dict[str, Any]  # a sample in samples.parquet


def write_samples_page(folder: Path, decode: DecodeText) -> Path:
    """Writes ``samples.html`` beside the summary and the samples that `write_evaluation` wrote.

    Args:
        decode: token ids to text without special tokens, for the texts of segments.
    """
    evaluation = json.loads((folder / SUMMARY).read_text())
    rows = pq.read_table(folder / SAMPLES).to_pylist()
    prompts = [list(group) for _, group in groupby(rows, key=lambda row: (row["data_set"], row["prompt_id"]))]
    shown = within_limits(prompts)
    texts = TokenTexts(decode)
    summaries = summaries_of(evaluation)
    tables = {title: rows_of(summary) for title, summary in summaries.items()}
    page = render(
        "samples.html.j2",
        title=f"Evaluation of {evaluation['model']}",
        evaluation=evaluation,
        tables=tables,
        labels=list(dict.fromkeys(label for table in tables.values() for label in table)),
        extents={title: extent(summary) for title, summary in summaries.items()},
        prompts=[[_sample(row, evaluation["pass_score"], texts) for row in samples] for samples in shown],
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
    counters = defaultdict[str, Iterator[int]](count)
    turns = [next(counters[samples[0]["data_set"]]) for samples in prompts]
    order = sorted(range(len(prompts)), key=lambda number: turns[number])
    sizes = accumulate(size_of(prompts[number]) for number in order)
    kept = [number for number, size in zip(order, sizes, strict=True) if size <= MAX_SIZE] or order[:1]
    return [prompts[number] for number in sorted(kept)]


def size_of(samples: Sequence[Row]) -> int:
    """Estimated characters of a prompt and its samples on the page."""
    texts = [samples[0]["prompt"], *(row[name] for row in samples for name in ("response", "why"))]
    num_tokens: int = sum(row["num_tokens"] for row in samples)
    return sum(map(len, texts)) + SIZE_OF_SAMPLE * len(samples) + SIZE_OF_TOKEN * num_tokens


def _sample(row: Row, pass_score: float, texts: TokenTexts) -> Row:
    """A row, with its status and its segments."""
    opens = row["opens"]
    return row | {
        "status": "failed" if row["failed"] else "right" if row["reward"] >= pass_score else "wrong",
        "num_segments": None if opens is None else sum(weight >= 0.5 for weight in opens),
        "segments": [row["response"]] if opens is None else _segments(texts(row["token_ids"]), opens),
    }


def _segments(texts: Sequence[str], opens: Sequence[float]) -> list[str]:
    """The text of each segment."""
    starts = [i for i, weight in enumerate(opens) if weight >= 0.5]
    return ["".join(texts[start:end]) for start, end in pairwise([*starts, len(texts)])]
