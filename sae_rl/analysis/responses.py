"""Responses as both pages show them: the tokens, or the text, of each segment."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]

from sae_rl.records.metrics import show

DecodeText = Callable[[list[int]], str]  # all tokens to one text
DecodeTokens = Callable[[list[int]], list[str]]  # each token to a text of its own
SPLIT_CHARACTER = 4  # characters between two segments that neither decodes, since a token may hold half a character
SEARCHED = 200  # characters after a segment in which the next one must begin

Row = dict[str, Any]  # a recorded rollout


@dataclass(frozen=True, slots=True)
class Token:
    text: str
    tip: str  # shown when pointed at


def split_at(text: str, token_ids: Sequence[int], opens: Sequence[float], decode: DecodeText) -> list[str]:
    """The text of each segment of a response; one text if the segments' texts are not found in it.

    A segment that is decoded by itself may lack a space at its start, or hold half a character. So each segment is
    searched for in the text after the one before it.
    """
    starts = [i for i, weight in enumerate(opens) if weight >= 0.5]
    cuts, place = list[int](), 0
    for start, end in pairwise([*starts, len(token_ids)]):
        piece = _trimmed(decode(list(token_ids[start:end])))
        found = text.find(piece, place, place + SEARCHED + len(piece))
        if found < 0 or len(_trimmed(text[place:found])) > SPLIT_CHARACTER:
            return [text]
        cuts.append(found)
        place = found + len(piece)
    return [text[start:end] for start, end in pairwise([0, *cuts[1:], len(text)])]


def _trimmed(text: str) -> str:
    """The text without spaces, and without a decoder's sign for half a character, at its ends."""
    return text.strip("\ufffd \t\r\n")


def pick_responses(table: pa.Table, decode: DecodeTokens) -> list[Row]:
    """Three responses of a recorded step: of the highest reward, of the lowest, and another; each of median length.

    The choice follows from the recorded rows alone, so that nobody can pick the prettiest.
    """
    rows: list[Row] = table.select(["prompt_id", "sample", "reward"]).to_pylist()  # the tokens of all take too long
    lengths = pc.list_value_length(table["token_ids"]).to_pylist()
    order = sorted(range(len(rows)), key=lambda i: (lengths[i], rows[i]["prompt_id"], rows[i]["sample"]))
    rewards = [row["reward"] for row in rows]
    picked = []
    for reason, wanted in (
        ("the highest reward of the step", {max(rewards)}),
        ("the lowest reward of the step", {min(rewards)}),
        ("of median length among the others", set(rewards)),
    ):
        if fitting := [i for i in order if rewards[i] in wanted]:
            chosen = fitting[len(fitting) // 2]
            order.remove(chosen)
            (row,) = table.slice(chosen, 1).to_pylist()
            picked.append(row | {"reason": reason, "segments": segments_of(row, decode)})
    return picked


def segments_of(row: Row, decode: DecodeTokens) -> list[list[Token]]:
    """The tokens of each segment of a recorded response, with their numbers as tips."""
    texts, values = decode(row["token_ids"]), row["values"]  # None: the estimator needs no critic
    assert len(texts) == len(row["token_ids"]), f"decode gave {len(texts)} strings for {len(row['token_ids'])} ids"
    segments = list[list[Token]]()
    for i, text in enumerate(texts):
        if row["opens"][i] >= 0.5:  # a soft segmenter gives weights; the first token always opens a segment
            segments.append([])
        value = "" if values is None else f", value {show(values[i])}"
        probability, advantage = show(math.exp(row["rollout_logprobs"][i])), show(row["advantages"][i])
        tip = f"token {i}, segment {len(segments)}: probability {probability}{value}, advantage {advantage}"
        segments[-1].append(Token(text, tip))
    return segments
