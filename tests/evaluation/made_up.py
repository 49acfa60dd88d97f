"""A made-up evaluation: two data sets with samples that are right, wrong, truncated, or whose check failed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, cast

import torch

from sae_rl.algo import Segmenter
from sae_rl.algo.segmenters import LowProbability
from sae_rl.config.compose import load_config
from sae_rl.config.schema import Config
from sae_rl.evaluation.evaluate import Evaluation, evaluate
from sae_rl.records.clock import Clock
from sae_rl.rewards.pool import Check, RewardPool, Rewards
from sae_rl.rewards.verdict import Failed, Verdict
from sae_rl.types import Prompt, Rollout
from tests.driver.scripted import ScriptedWorkers

WORDS = [f" w{i}" for i in range(60)]
NASTY = "</div><script>alert('x')</script> & \"quoted\""


def decode(token_ids: Sequence[int]) -> str:
    """Decodes as byte-level tokenizers do, without the space at the start, which many of them drop."""
    return "".join(WORDS[i] for i in token_ids).lstrip()


def make_config(folder: object, *more: str) -> Config:
    return load_config(
        [
            f"output_dir={folder}",
            "model.path=nobody/nothing",
            "model.context_tokens=1024",
            "rollout.max_response_tokens=64",
            "evaluation.samples_per_prompt=4",
            "algorithm.segmenter.p=0.2",
            *more,
        ]
    )


def make_prompts(sets: Sequence[tuple[str, int]] = (("sums", 6), ("hub/tales", 4))) -> list[Prompt]:
    return [
        Prompt(
            id=f"{name}-{i}",
            text=f"What is {i} + {i}?\n{NASTY}",
            token_ids=(1, 2, i),
            answer=str(2 * i),
            task=name,
            reward="exact",
        )
        for name, count in sets
        for i in range(count)
    ]


class MadeUpEngines(ScriptedWorkers):
    """Responses of 1 to 40 words that depend on the prompt and the sample; the last prompt comes first."""

    def generate(self, prompts: Sequence[Prompt], *, group_size: int, sampling: Any, seed_name: str) -> Any:
        for prompt in reversed(prompts):
            yield [self._response(prompt, i, sampling.temperature) for i in range(group_size)]

    def _response(self, prompt: Prompt, sample: int, temperature: float) -> Rollout:
        rng = random.Random(f"{prompt.id} {sample}")
        length = rng.randint(1, 40)
        token_ids = torch.tensor([rng.randrange(len(WORDS)) for _ in range(length)])
        return Rollout(
            prompt=prompt,
            sample=sample,
            token_ids=token_ids,
            rollout_logprobs=torch.tensor([rng.uniform(0.01, 1) for _ in range(length)]).log(),
            text=decode(token_ids.tolist()),
            finish_reason="length" if length > 30 else "stop",
            policy_versions=torch.zeros(length, dtype=torch.int64),
            temperature=temperature,
        )


def outcome_of(rollout: Rollout) -> Verdict | Failed:
    """Checks of "sums" find an answer in most responses, those of the other data set never; one in twelve fails."""
    draw = int(rollout.token_ids.sum()) % 12
    if draw == 0:
        return Failed(f"no answer in time {NASTY}")
    right = draw < 6
    answers = rollout.prompt.task == "sums" and draw != 11
    return Verdict(float(right), f"draw {draw} {NASTY}", f"answer {draw // 4}" if answers else None)


class MadeUpRewards:
    def __init__(self, failed_score: float) -> None:
        self._failed_score = failed_score

    def submit(self, rollouts: Sequence[Rollout]) -> list[Check]:
        checks = []
        for rollout in rollouts:
            future: Future[Any] = Future()
            future.set_result(outcome_of(rollout))
            checks.append(Check(rollout.prompt.id, future))
        return checks

    def collect(self, checks: Sequence[Check]) -> Rewards:
        return Rewards([check.future.result() for check in checks], self._failed_score)


def made_up(config: Config, prompts: Sequence[Prompt] | None = None, segmenter: Segmenter | None = None) -> Evaluation:
    algorithm = config.algorithm.model_copy(update={"segmenter": segmenter or LowProbability(0.2)})
    return evaluate(
        make_prompts() if prompts is None else prompts,
        MadeUpEngines(),
        cast(RewardPool, MadeUpRewards(config.rewards.failed_score)),
        Clock(),
        config.model_copy(update={"algorithm": algorithm}),
    )


def without_answers(rewards: Rewards) -> Rewards:
    found = [replace(each, answer=None) if isinstance(each, Verdict) else each for each in rewards.outcomes]
    return replace(rewards, outcomes=found)
