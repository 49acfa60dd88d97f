"""Calls the plug-ins of a configuration once, so that their mistakes are told before anything starts.

A plug-in is a class or a function that the configuration names by its import path. A new kind of plug-in is a function here
that yields what is wrong, and its line in `TRIALS`. Built-in members are not called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import cycle

import torch
from torch import Tensor

from sae_rl.algo.estimators import SegmentGAE, estimate
from sae_rl.algo.segmentation import segment
from sae_rl.algo.segmenters import with_vocabulary
from sae_rl.algo.value_sources import Continuations, check_places
from sae_rl.config.schema import Config
from sae_rl.data.prompts import Record
from sae_rl.data.sources.mixture import MixtureSource
from sae_rl.data.sources.procedural import ProceduralSource
from sae_rl.data.sources.source import Source
from sae_rl.plugins import is_users
from sae_rl.rewards.function import Function
from sae_rl.rewards.pool import RewardPool
from sae_rl.rewards.table import parts_of, resolve
from sae_rl.rewards.verdict import Failed, Verifier, shown
from sae_rl.tasks.table import make_task, try_task
from sae_rl.types import Batch, Prompt, Rollout, Scores

NUM_PROMPTS, LENGTHS = 3, (5, 1, 3)  # the made-up batch: its prompts, and the tokens of its responses in turns
UNANSWERED = "I do not know."


class AnyText(str):
    """The text of a token that contains every delimiter: no tokenizer is loaded yet."""

    def __contains__(self, part: object) -> bool:
        return True


def try_plug_ins(config: Config) -> list[str]:
    """Lines about plug-ins that raise an exception, or return what a run would refuse; each begins with the key.

    The kinds are tried in their order up to the first with a problem, since later ones build on it.
    """
    return next((problems for trial in TRIALS if (problems := list(trial(config)))), [])


def try_algorithm(config: Config) -> Iterator[str]:
    """Segmenter, value source and estimator in turn, without and with tokens that the policy did not sample."""
    algorithm = config.algorithm
    needs_hard_segments = isinstance(algorithm.estimator, SegmentGAE)
    parts = (algorithm.segmenter, algorithm.value_source, algorithm.estimator)
    if not needs_hard_segments and not any(map(is_users, parts)):
        return
    segmenter = with_vocabulary(algorithm.segmenter, lambda: [AnyText()])
    for has_tool, where in (
        (False, ""),
        (True, "; this batch has an action_mask: the policy did not sample all tokens"),
    ):
        batch = made_up_batch(config, has_tool)
        scores = made_up_scores(config, batch)
        try:
            opens = segment(segmenter, batch, scores)
        except ValueError as error:
            yield f"algorithm.segmenter: {error}{where}"
            return
        token_rewards = algorithm.token_rewards(batch, scores)
        try:
            continuations = made_up_continuations(opens)
            scores = algorithm.with_values(batch, scores, token_rewards, opens, continuations)
        except ValueError as error:
            yield f"algorithm.value_source: {error}{where}"
            return
        try:
            estimate(algorithm.estimator, batch, scores, token_rewards, opens)
        except ValueError as error:
            yield f"algorithm.estimator: {error}{where}"
            return


def made_up_batch(config: Config, has_tool: bool) -> Batch:
    """Three groups of responses of 5, 1 and 3 tokens, in turns.

    Args:
        has_tool: the policy did not sample the second token of the longer responses, as behind a tool's output.
    """
    rollouts, lengths = [], cycle(LENGTHS)
    for i in range(NUM_PROMPTS):
        prompt = Prompt(id=str(i), text=str(i), token_ids=(1, 2), answer=str(i), task="made-up", reward="made-up")
        for sample in range(config.rollout.group_size):
            rollout = replace(
                _made_up(prompt, sample, next(lengths), "made-up"), temperature=config.rollout.temperature
            )
            tool = torch.arange(rollout.token_ids.numel()) == 1
            rollouts.append(replace(rollout, action_mask=~tool) if has_tool else rollout)
    return Batch.of(rollouts, [float(i % 2) for i in range(len(rollouts))])


def _made_up(prompt: Prompt, sample: int, num_tokens: int, text: str) -> Rollout:
    return Rollout(
        prompt=prompt,
        sample=sample,
        token_ids=torch.arange(num_tokens, dtype=torch.int32),
        rollout_logprobs=torch.linspace(-3.0, -0.1, num_tokens),
        text=text,
        finish_reason="length" if num_tokens == max(LENGTHS) else "stop",
        policy_versions=torch.zeros(num_tokens, dtype=torch.int32),
        temperature=1.0,
    )


def made_up_scores(config: Config, batch: Batch) -> Scores:
    """What the networks of such a run compute; None where they compute nothing."""
    algorithm = config.algorithm
    logprobs, values = batch.rollout_logprobs, torch.linspace(0.0, 1.0, batch.num_tokens)
    has_old = config.scores_policy or algorithm.policy_loss.old_logprobs == "rollout"
    return Scores(
        old_logprobs=logprobs if has_old else None,
        values=values if algorithm.needs_critic else None,
        ref_logprobs=logprobs - 0.1 if algorithm.needs_reference else None,
        entropies=2 * values if algorithm.needs_entropies else None,
        value_spread=values / 2 if algorithm.needs_critic and algorithm.num_critics > 1 else None,
        final_values=torch.full((batch.num_responses,), 0.5) if algorithm.bootstrap_truncated else None,
    )


def made_up_continuations(opens: Tensor) -> Continuations:
    """Continuations with returns 0, 1, 0, ...; a check failed at every other place, and the budget ends before the last."""

    def sample(at: Tensor, k: int, max_tokens: int) -> Tensor:
        check_places(at, opens)
        returns = torch.arange(at.numel() * k, dtype=torch.float64).view(-1, k) % 2
        returns[::2, :1] = torch.nan
        return returns.index_fill(0, torch.arange(at.numel())[-1:], torch.nan)

    return sample


def _tasks(config: Config) -> Iterator[str]:
    """The first problem of each split."""
    for key, source in _sources(config):
        if isinstance(source, ProceduralSource) and is_users(task := make_task(source.name, source.knobs)):
            try:
                try_task(task)
            except ValueError as error:
                yield f"{key}: {error}"


def _verifiers(config: Config) -> Iterator[str]:
    """Each source's verifier on its first problem."""
    configured = config.rewards.verifiers
    asked: list[tuple[str, Prompt]] = []  # with the key of the reward
    for key, source in _sources(config):
        reward = getattr(source, "reward", None)
        try:
            if not reward or not (":" in reward or any(map(_has_users, configured.values()))):
                continue
            resolve(reward, configured)  # raises for a path that cannot be imported
            if (record := source.first_record()) is not None:
                resolve(record.reward, configured)
                asked.append((f"{key}.reward", _prompt_of(record)))
        except ValueError as error:
            yield f"{key}.reward: {error}"
    yield from _called(config, asked)


def try_rewards(config: Config, prompts: Iterable[Prompt]) -> list[str]:
    """Lines about verifiers that only rows or data sets from the hub name, as `try_plug_ins` has them of the others."""
    first: dict[str, Prompt] = {}
    for prompt in prompts:
        first.setdefault(prompt.reward, prompt)
    own = [prompt for name, prompt in first.items() if _has_users(resolve(name, config.rewards.verifiers))]
    if not own:
        return []
    of_sources = (source.first_record() for _, source in _sources(config) if getattr(source, "reward", None))
    tried = {record.reward for record in of_sources if record is not None}
    return list(_called(config, [("a row's reward", prompt) for prompt in own if prompt.reward not in tried]))


def _called(config: Config, asked: Sequence[tuple[str, Prompt]]) -> Iterator[str]:
    """Lines about the users' verifiers of prompts: on the right answer, and on a response without an answer.

    They run as in training: in a process of the reward pool, with its deadline and its limit of memory.

    Args:
        asked: what names a reward in messages, and a prompt that has it. A reward is called on its first prompt.
    """
    tried: dict[str, Verifier] = {}  # label -> verifier
    rollouts: list[tuple[str, Rollout]] = []
    for key, prompt in asked:
        if prompt.reward in tried:
            continue
        parts = filter(_is_users, parts_of(resolve(prompt.reward, config.rewards.verifiers)))
        for number, part in enumerate(parts):
            label = f"{prompt.reward}{f', part {number + 1}' if number else ''}"
            tried[label] = part
            rollouts += [(key, _answered(replace(prompt, reward=label), text)) for text in (prompt.answer, UNANSWERED)]
    if not rollouts:
        return
    limits = {name: getattr(config.rewards, name) for name in ("deadline_s", "memory_gb", "failed_score")}
    try:
        with RewardPool(num_processes=1, max_failed_fraction=1.0, verifiers=tried, **limits) as pool:
            outcomes = pool.collect(pool.submit([rollout for _, rollout in rollouts])).outcomes
    except ValueError as error:  # a verifier that cannot be sent to a process
        yield f"rewards.verifiers: {error}"
        return
    for (key, rollout), outcome in zip(rollouts, outcomes, strict=True):
        if isinstance(outcome, Failed) and rollout.prompt.reward in tried:
            del tried[rollout.prompt.reward]  # one line for each verifier
            right = shown(rollout.prompt.answer)
            yield f"{key}: {outcome.why}; the right answer was {right}, the response {shown(rollout.text)}"


def _is_users(verifier: Verifier) -> bool:
    """Whether a user wrote the verifier itself. Raises ValueError for a function that cannot be imported."""
    return is_users(verifier.function() if isinstance(verifier, Function) else type(verifier))


def _has_users(verifier: Verifier) -> bool:
    return any(map(_is_users, parts_of(verifier)))


def _sources(config: Config) -> Iterator[tuple[str, Source]]:
    for key, source in (("task.train", config.task.train), ("task.evaluation", config.task.evaluation)):
        if isinstance(source, MixtureSource):
            yield from ((f"{key}.parts.{name}", part) for name, part in source.parts.items())
        elif source is not None:
            yield key, source


def _prompt_of(record: Record) -> Prompt:
    text = record.prompt if isinstance(record.prompt, str) else "\n".join(str(m["content"]) for m in record.prompt)
    return Prompt(id=record.id, text=text, token_ids=(1,), answer=record.answer, task=record.task, reward=record.reward)


def _answered(prompt: Prompt, response: str) -> Rollout:
    return _made_up(prompt, 0, max(1, len(response.split())), response)


# The kinds of plug-ins.
TRIALS: tuple[Callable[[Config], Iterator[str]], ...] = (try_algorithm, _tasks, _verifiers)
