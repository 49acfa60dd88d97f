"""Single responses as the report shows them: token by token, segment by segment."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from markupsafe import Markup

from sae_rl.analysis.charts import Line, line_chart
from sae_rl.records.metrics import show

Decode = Callable[[list[int]], list[str]]
SHOWN_TOKENS = (1200, 300)  # of a longer response, its beginning and its end


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    text: str
    opens: bool
    segment: int  # counted from 0
    tip: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """One response, and why it is shown."""

    heading: str
    prompt: str
    answer: str
    facts: str
    head: list[Token]
    tail: list[Token]  # empty unless tokens are left out
    num_left_out: int
    charts: list[tuple[str, Markup]]


def pick_responses(rows: Any, decode: Decode) -> list[Response]:
    """Of a recorded step: one response of the highest reward, one of the lowest, one other; each of median length.

    The choice depends on nothing but the recorded rows, so that nobody can pick the prettiest.
    """
    records: list[dict[str, Any]] = rows.to_pylist()
    rewards = [record["reward"] for record in records]
    best, worst = max(rewards), min(rewards)
    reasons: list[tuple[str, Callable[[float], bool]]] = [
        ("the highest reward of the step", lambda reward: reward == best),
        ("the lowest reward of the step", lambda reward: reward == worst),
        ("of median length among the others", lambda _: True),
    ]
    picked: list[int] = []
    responses = []
    for reason, fits in reasons:
        if free := [i for i, reward in enumerate(rewards) if i not in picked and fits(reward)]:
            free.sort(key=lambda i: (len(records[i]["token_ids"]), records[i]["prompt_id"], records[i]["sample"]))
            picked.append(free[len(free) // 2])
            responses.append(_response(records[picked[-1]], reason, decode))
    return responses


def _response(record: dict[str, Any], reason: str, decode: Decode) -> Response:
    texts = decode(record["token_ids"])
    assert len(texts) == len(record["token_ids"]), (
        f"decode gave {len(texts)} strings for {len(record['token_ids'])} ids"
    )
    tokens = _tokens(record, texts)
    head, tail = SHOWN_TOKENS
    num_left_out = max(0, len(tokens) - head - tail)
    num_segments = sum(token.opens for token in tokens)
    ending = "ended by itself" if record["finish_reason"] == "stop" else "cut at the length limit"
    return Response(
        heading=f"Reward {record['reward']:g}: {reason}",
        prompt=record["prompt"],
        answer=record["answer"],
        facts=f"{len(tokens)} tokens, {num_segments} segments, {ending}; prompt {record['prompt_id']}, "
        f"sample {record['sample']}, sampled by the policy of {_steps(record['policy_versions'])}",
        head=tokens if num_left_out == 0 else tokens[:head],
        tail=[] if num_left_out == 0 else tokens[-tail:],
        num_left_out=num_left_out,
        charts=_charts(record, [i for i, token in enumerate(tokens) if token.opens]),
    )


def _steps(versions: Sequence[int]) -> str:
    first, last = versions[0], versions[-1]
    return f"step {first}" if first == last else f"steps {first} to {last}"


def _tokens(record: dict[str, Any], texts: Sequence[str]) -> list[Token]:
    count = len(texts)
    values = record["values"] or [math.nan] * count  # null: the estimator has no critic
    opens = [float(weight) >= 0.5 for weight in record["opens"]]  # a soft segmenter gives weights
    segments = [number - 1 for number in accumulate(map(int, opens))]
    tokens = []
    for i, text in enumerate(texts):
        probability = math.exp(record["rollout_logprobs"][i])
        value = "" if math.isnan(values[i]) else f", value {show(values[i])}"
        tip = f"token {i}, segment {segments[i] + 1}: probability {show(probability)}{value}, advantage "
        tokens.append(
            Token(text=text, opens=opens[i], segment=segments[i], tip=f"{tip}{show(record['advantages'][i])}")
        )
    return tokens


def _charts(record: dict[str, Any], boundaries: Sequence[int]) -> list[tuple[str, Markup]]:
    charts = []
    for key, title, colour in (("values", "value V(s_t)", "c1"), ("advantages", "advantage A_t", "c2")):
        if record[key] is None or not any(map(math.isfinite, record[key])):
            continue
        line = Line(label=title, points=[(float(i), y) for i, y in enumerate(record[key])], colour=colour)
        svg = line_chart(
            [line],
            label=f"{title} along the response",
            x_label="token" if key == "advantages" else "",
            show=show,
            zero=key == "advantages",
            size=(1080.0, 120.0),
            marks=boundaries,
            smoothed=False,
        )
        charts.append((title, svg))
    return charts
