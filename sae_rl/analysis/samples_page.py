"""The page of an evaluation: its numbers, and its samples to read, filter and search, in one HTML file without network."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

from sae_rl.analysis.evaluation_table import extent, rows_of, summaries_of
from sae_rl.analysis.pages import environment
from sae_rl.evaluation.files import PAGE, SAMPLES, SUMMARY
from sae_rl.records.samples import read_samples

DecodeText = Callable[[list[int]], str]
MAX_SAMPLES = 5000
MAX_SIZE = 12_000_000  # about the characters of the page
SHOWN = (12_000, 4000)  # characters of a longer response, its beginning and its end
SIZE_OF_TOKEN = 4  # what marking segments costs, in characters per token
EXCERPT = 200
SPLIT_CHARACTER = 4  # characters between two segments that neither decodes, as a token may hold half of one
WINDOW = 200  # characters behind a segment in which the next must begin


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One response as the page shows it."""

    number: int
    status: str  # right, wrong or failed
    truncated: bool
    score: float
    why: str
    extracted: str | None
    num_tokens: int
    num_segments: int | None  # None: not known
    head: list[str]  # the text of each segment, or all in one where segments are not known
    tail: list[str]  # empty unless a part is left out
    num_left_out: int  # characters


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A prompt and its samples."""

    data_set: str
    id: str
    excerpt: str
    prompt: str
    answer: str
    samples: list[Sample]

    @property
    def num_right(self) -> int:
        return sum(sample.status == "right" for sample in self.samples)


def write_samples_page(folder: Path, decode: DecodeText) -> Path:
    """Writes ``samples.html`` beside the summary and the samples that `write_evaluation` left.

    Args:
        decode: from token ids to text without special tokens, to find where in a response segments open.
    """
    evaluation = json.loads((folder / SUMMARY).read_text())
    index = read_samples(folder / SAMPLES, ("data_set", "prompt_id", "prompt", "response", "why", "num_tokens"))
    groups = prompts_of(index)
    shown = within_limits(groups)
    rows = read_samples(folder / SAMPLES).take(pa.array([row for group in shown for row in group.rows])).to_pylist()
    pass_score = evaluation["pass_score"]
    questions = [
        _question(list(of_prompt), pass_score, decode)
        for _, of_prompt in groupby(rows, key=lambda row: (row["data_set"], row["prompt_id"]))
    ]
    summaries = summaries_of(evaluation)
    tables = {title: {row.label: row for row in rows_of(summary)} for title, summary in summaries.items()}
    page = (
        environment()
        .get_template("samples.html.j2")
        .render(
            evaluation=evaluation,
            tables=tables,
            labels=list(dict.fromkeys(label for table in tables.values() for label in table)),
            extents={title: extent(summary) for title, summary in summaries.items()},
            questions=questions,
            data_sets=list(evaluation["data_sets"]),
            shown=counts(groups, shown),
            num_samples=index.num_rows,
            samples_file=SAMPLES,
        )
    )
    target = folder / PAGE
    target.write_text(page)
    return target


@dataclass(frozen=True, slots=True)
class PromptRows:
    """Where the samples of one prompt are in the file."""

    data_set: str
    rows: Sequence[int]
    size: int  # of the page, in characters, about


def prompts_of(index: pa.Table) -> list[PromptRows]:
    """The prompts of a file, in its order."""
    lengths = {
        name: np.array([len(text) for text in index[name].to_pylist()]) for name in ("prompt", "response", "why")
    }
    sizes = np.minimum(lengths["response"], sum(SHOWN)) + lengths["why"]
    sizes += SIZE_OF_TOKEN * index["num_tokens"].to_numpy()
    names = list(zip(index["data_set"].to_pylist(), index["prompt_id"].to_pylist(), strict=True))
    return [
        PromptRows(data_set, rows, int(sizes[rows].sum() + lengths["prompt"][rows[0]]))
        for (data_set, _), part in groupby(range(len(names)), key=names.__getitem__)
        if (rows := list(part))
    ]


def within_limits(groups: Sequence[PromptRows]) -> list[PromptRows]:
    """The first prompts of every data set in turn, until the page is full; in the order of the file."""
    by_data_set: dict[str, list[PromptRows]] = {}
    for group in groups:
        by_data_set.setdefault(group.data_set, []).append(group)
    kept: list[PromptRows] = []
    num_samples = size = 0
    for group in (group for turn in zip_longest(*by_data_set.values()) for group in turn if group is not None):
        num_samples, size = num_samples + len(group.rows), size + group.size
        if kept and (num_samples > MAX_SAMPLES or size > MAX_SIZE):
            break
        kept.append(group)
    return sorted(kept, key=lambda group: group.rows[0])


def counts(groups: Sequence[PromptRows], shown: Sequence[PromptRows]) -> dict[str, tuple[int, int]]:
    """By data set: how many of its prompts are shown, of how many."""

    def number(among: Sequence[PromptRows], data_set: str) -> int:
        return sum(group.data_set == data_set for group in among)

    return {name: (number(shown, name), number(groups, name)) for name in dict.fromkeys(g.data_set for g in groups)}


def _question(rows: Sequence[Mapping[str, Any]], pass_score: float, decode: DecodeText) -> Question:
    first = rows[0]
    words = " ".join(first["prompt"].split())
    return Question(
        data_set=first["data_set"],
        id=first["prompt_id"],
        excerpt=words if len(words) <= EXCERPT else words[: EXCERPT - 2] + " …",
        prompt=first["prompt"],
        answer=first["answer"],
        samples=[_sample(row, pass_score, decode) for row in rows],
    )


def _sample(row: Mapping[str, Any], pass_score: float, decode: DecodeText) -> Sample:
    opens = row["opens"]
    pieces = [row["response"]] if opens is None else split_at(row["response"], row["token_ids"], opens, decode)
    head, tail, num_left_out = shortened(pieces)
    return Sample(
        number=row["sample"],
        status="failed" if row["failed"] else "right" if row["score"] >= pass_score else "wrong",
        truncated=row["finish_reason"] == "length",
        score=row["score"],
        why=row["why"],
        extracted=row["extracted_answer"],
        num_tokens=row["num_tokens"],
        num_segments=None if opens is None else sum(weight >= 0.5 for weight in opens),
        head=head,
        tail=tail,
        num_left_out=num_left_out,
    )


def split_at(text: str, token_ids: Sequence[int], opens: Sequence[float], decode: DecodeText) -> list[str]:
    """A response cut where segments open; in one piece if its text cannot be matched with that of its segments.

    A segment decoded by itself may lack a space at its start, or hold half a character: it is looked for in the text
    behind the one before it.
    """
    starts = [i for i, weight in enumerate(opens) if weight >= 0.5]
    cuts, place = list[int](), 0
    for start, end in pairwise([*starts, len(token_ids)]):
        piece = _trimmed(decode(list(token_ids[start:end])))
        found = text.find(piece, place, place + WINDOW + len(piece))
        if found < 0 or len(_trimmed(text[place:found])) > SPLIT_CHARACTER:
            return [text]
        cuts.append(found)
        place = found + len(piece)
    return [text[start:end] for start, end in pairwise([0, *cuts[1:], len(text)])]


def _trimmed(text: str) -> str:
    """Without spaces, and what decoders write for half a character, at its ends."""
    return text.strip("\ufffd \t\r\n")


def shortened(pieces: Sequence[str]) -> tuple[list[str], list[str], int]:
    """The beginning and the end of a long response, and how many characters between them are left out."""
    total = sum(map(len, pieces))
    num_head, num_tail = SHOWN
    if total <= num_head + num_tail:
        return list(pieces), [], 0
    head = _first(pieces, num_head)
    tail = [piece[::-1] for piece in reversed(_first([piece[::-1] for piece in reversed(pieces)], num_tail))]
    return head, tail, total - num_head - num_tail


def _first(pieces: Sequence[str], num_characters: int) -> list[str]:
    kept = list[str]()
    for piece in pieces:
        if num_characters <= 0:
            break
        kept.append(piece[:num_characters])
        num_characters -= len(piece)
    return kept
