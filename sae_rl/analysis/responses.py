"""Responses as both pages show them: cut into segments, and without the middle of a long one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]

from sae_rl.records.metrics import show

DecodeText = Callable[[list[int]], str]  # all tokens to one text
DecodeTokens = Callable[[list[int]], list[str]]  # each token to a text of its own
SHOWN = (12_000, 4000)  # characters of a longer response: its beginning and its end
SPLIT_CHARACTER = 4  # characters between two segments that neither decodes, since a token may hold half a character
SEARCHED = 200  # characters after a segment in which the next one must begin


@dataclass(frozen=True, slots=True)
class Token:
    text: str
    tip: str = ""  # shown when pointed at


Segment = Sequence[Token]  # or a single `Token` with the text of all


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """The segments of a response that a page shows."""

    head: list[Segment]
    tail: list[Segment]  # empty unless a part is left out
    num_left_out: int  # characters


def shortened(segments: Sequence[Segment]) -> Response:
    """The beginning and the end of a long response, and the number of characters between them."""
    total = sum(len(token.text) for segment in segments for token in segment)
    num_head, num_tail = SHOWN
    if total <= num_head + num_tail:
        return Response(head=list(segments), tail=[], num_left_out=0)
    return Response(
        head=_characters(segments, 0, num_head),
        tail=_characters(segments, total - num_tail, total),
        num_left_out=total - num_head - num_tail,
    )


def _characters(segments: Sequence[Segment], start: int, end: int) -> list[Segment]:
    """The characters from ``start`` to ``end`` of a response."""
    kept, place = list[Segment](), 0
    for segment in segments:
        part = []
        for token in segment:
            text = token.text[max(0, start - place) : max(0, end - place)]
            place += len(token.text)
            part += [replace(token, text=text)] if text else []
        kept += [part] if part else []
    return kept


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


def pick_responses(rows: pa.Table, decode: DecodeTokens) -> list[dict[str, Any]]:
    """Three responses of a recorded step: of the highest reward, of the lowest, and another; each of median length.

    The choice follows from the recorded rows alone, so that nobody can pick the prettiest.
    """
    records: list[dict[str, Any]] = rows.to_pylist()
    records.sort(key=lambda row: (len(row["token_ids"]), row["prompt_id"], row["sample"]))
    rewards = [row["reward"] for row in records]
    examples = []
    for reason, wanted in (
        ("the highest reward of the step", {max(rewards)}),
        ("the lowest reward of the step", {min(rewards)}),
        ("of median length among the others", set(rewards)),
    ):
        if fitting := [i for i, row in enumerate(records) if row["reward"] in wanted]:
            examples.append(_example(records.pop(fitting[len(fitting) // 2]), reason, decode))
    return examples


def _example(row: dict[str, Any], reason: str, decode: DecodeTokens) -> dict[str, Any]:
    """A row of recorded rollouts, with its heading and its segments."""
    segments, count = segments_of(row, decode), len(row["token_ids"])
    ending = "ended by itself" if row["finish_reason"] == "stop" else "cut at the length limit"
    first, last = row["policy_versions"][0], row["policy_versions"][-1]
    versions = f"step {first}" if first == last else f"steps {first} to {last}"
    facts = f"{count} tokens, {len(segments)} segments, {ending}; prompt {row['prompt_id']}, sample {row['sample']}, "
    facts += f"sampled by the policy of {versions}"
    return row | {"heading": f"Reward {row['reward']:g}: {reason}", "facts": facts, "shown": shortened(segments)}


def segments_of(row: dict[str, Any], decode: DecodeTokens) -> list[Segment]:
    """The tokens of each segment of a recorded response, with their numbers as tips."""
    texts, values = decode(row["token_ids"]), row["values"]  # None: the estimator has no critic
    assert len(texts) == len(row["token_ids"]), f"decode gave {len(texts)} strings for {len(row['token_ids'])} ids"
    segments = list[list[Token]]()
    for i, text in enumerate(texts):
        if row["opens"][i] >= 0.5:  # a soft segmenter gives weights; the first token always opens a segment
            segments.append([])
        value = "" if values is None else f", value {show(values[i])}"
        probability, advantage = show(math.exp(row["rollout_logprobs"][i])), show(row["advantages"][i])
        tip = f"token {i}, segment {len(segments)}: probability {probability}{value}, advantage {advantage}"
        segments[-1].append(Token(text, tip))
    return [*segments]
