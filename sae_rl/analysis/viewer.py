"""Responses token by token: what the script of a page reads."""

from __future__ import annotations

import base64
import hashlib
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa  # type: ignore[import-untyped]
import torch
from markupsafe import Markup
from torch import Tensor

from sae_rl.analysis.pages import render
from sae_rl.analysis.step_columns import Column, batch_of, columns_of
from sae_rl.analysis.token_texts import TokenTexts

# A float has 23 bits after the point. With 11 the relative error is at most 2^-12; the page shows about three digits.
KEPT_BITS = 11
SHOWN = (
    "prompt_id",
    "prompt",
    "answer",
    "sample",
    "reward",
    "why",
    "finish_reason",
)  # columns without numbers per token
SCRIPTS = ("viewer_charts.js", "viewer.js")

Row = dict[str, Any]  # a recorded rollout, without its numbers per token


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """What the page needs of a tokenizer."""

    decode: Callable[[list[int]], str]  # with special tokens
    special_ids: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Viewed:
    """All responses of a step, or of a correlate folder."""

    table: pa.Table  # as `read_rollouts` returns it
    columns: Sequence[Column]
    notes: Sequence[str]  # what is left out, and why
    pass_score: float  # a response with this reward or more is right


def view_of_step(table: pa.Table, config: Mapping[str, Any]) -> Viewed:
    """A recorded step. ``config`` is what ``config.yaml`` holds."""
    columns, notes = columns_of(table, config)
    return Viewed(table=table, columns=columns, notes=notes, pass_score=pass_score_of(config))


def pass_score_of(config: Mapping[str, Any]) -> float:
    return float(config["evaluation"]["pass_score"]) if "evaluation" in config else 1.0


def chosen(viewed: Viewed, most: int, first: int = 0) -> list[int]:
    """The rows of the group of row ``first``, then the others in order, as many as ``most``: in the order of the table."""
    prompts = viewed.table["prompt_id"].to_pylist()
    wanted = sorted(range(len(prompts)), key=lambda i: (i != first, prompts[i] != prompts[first], i))
    return sorted(wanted[:most])


def show_responses(viewed: Viewed, rows: Sequence[int], vocabulary: Vocabulary, first: int = 0) -> dict[str, Any]:
    """What `viewer.html.j2` needs to show the rows, which begin at row ``first``."""
    script = "\n".join(Path(__file__).with_name(name).read_text() for name in SCRIPTS)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return {
        "data": page_data(viewed, rows, vocabulary, first),
        "script": Markup(script),
        "policy": f"script-src 'sha256-{digest}'",  # a script that a response might smuggle in does not run
    }


def page_data(viewed: Viewed, rows: Sequence[int], vocabulary: Vocabulary, first: int) -> dict[str, Any]:
    """Texts and numbers of the rows, which JSON can hold."""
    batch, texts = batch_of(viewed.table), TokenTexts(vocabulary.decode)
    prompts, pieces = dict[tuple[str, str], int](), dict[tuple[str, bool], int]()
    responses = []
    for i in rows:
        row = viewed.table.select(SHOWN).slice(i, 1).to_pylist()[0]
        start, end = batch.offsets[i : i + 2].tolist()
        ids, prompt = batch.token_ids[start:end].tolist(), batch.prompt_token_ids[: batch.prompt_offsets[i + 1]]
        before = int(prompt[-1]) if batch.prompt_lengths[i] else None
        shown = zip(texts(ids, before), (each in vocabulary.special_ids for each in ids), strict=True)
        used = [pieces.setdefault(piece, len(pieces)) for piece in shown]
        responses.append(
            {
                "index": i,
                "id": f"{row['prompt_id']}/{row['sample']}",
                "prompt": prompts.setdefault((row["prompt"], row["answer"]), len(prompts)),
                **{name: row[name] for name in ("why", "finish_reason")},
                "reward": row["reward"] if math.isfinite(row["reward"]) else None,  # JSON has no NaN and no infinity
                "right": row["reward"] >= viewed.pass_score,
                "length": len(ids),
                "tokens": packed(np.array([used, ids], dtype="<u4")),
                "numbers": packed(_rounded([column.numbers[start:end] for column in viewed.columns])),
            }
        )
    return {
        "columns": [{"kind": column.kind, "label": column.label} for column in viewed.columns],
        "prompts": [{"text": text, "answer": answer} for text, answer in prompts],
        "texts": [text for text, _ in pieces],
        "special": [i for i, (_, is_special) in enumerate(pieces) if is_special],
        "notes": list(viewed.notes),
        "total": viewed.table.num_rows,
        "first": first,
        "responses": responses,
    }


def _rounded(numbers: Sequence[Tensor]) -> npt.NDArray[np.float32]:
    """(C, T) float32 whose last bits are 0, which compress well."""
    dropped = 23 - KEPT_BITS
    stacked = torch.stack([each.to(torch.float32) for each in numbers]).numpy()
    bits = stacked.view(np.uint32)
    nearest = (bits + (1 << (dropped - 1))) >> dropped << dropped
    return np.where(np.isfinite(stacked), nearest, bits).astype("<u4").view("<f4")


def packed(numbers: npt.NDArray[Any]) -> str:
    """Numbers of 4 bytes: first all first bytes, then all second ones, and so on; deflate; base64."""
    planes = np.ascontiguousarray(numbers).view(np.uint8).reshape(-1, 4).T
    return base64.b64encode(zlib.compress(planes.tobytes(), 6)).decode()


def write_page(viewed: Viewed, rows: Sequence[int], vocabulary: Vocabulary, output: Path, **values: Any) -> None:
    """Writes a page that has nothing but the responses. ``values``: ``title``, ``source`` and ``config_text``."""
    shown = show_responses(viewed, rows, vocabulary, values.pop("first"))
    output.write_text(render("view.html.j2", viewer=shown, **values))
