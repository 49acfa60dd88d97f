"""Groups whose responses branch, so that they share prefixes (TreeRL, arXiv 2506.11902; TreePO, arXiv 2508.17445)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from sae_rl.algo.segmentation import segment
from sae_rl.rewards.pool import Rewards
from sae_rl.rollouts.continuations import joined, prompt_at
from sae_rl.rollouts.groups import Checked, collected
from sae_rl.run import Run
from sae_rl.seeds import derive_seed
from sae_rl.types import Batch, Prompt, Rollout, Scores

Place = tuple[Rollout, int]  # a response, and its tokens before the place


def sample_branching(
    run: Run, prompts: Sequence[Prompt], seed_name: str, num_first: int
) -> tuple[list[Rollout], Rewards]:
    """Samples ``num_first`` responses to each prompt, and the rest of its group as branches of them; checks all.

    A branch begins at a random place of a first response where a segment opens; places differ while there are enough. A
    first response of one segment has none, and then a branch begins at the prompt. Tokens before a branch keep their
    logprobs and versions, and count in each response that has them.

    Returns:
        Rollouts, the first responses of a group before its branches, and their rewards, in the order of the prompts.
    """
    rollout = run.config.rollout
    sampling, num_branches = rollout.sampling(rollout.max_response_tokens), rollout.group_size - num_first
    found: dict[str, list[Checked]] = {}
    with run.clock.phase("generate"):
        engines = run.workers.rollout
        for group in engines.generate(prompts, group_size=num_first, sampling=sampling, seed_name=seed_name):
            found[group[0].prompt.id] = list(zip(group, run.rewards.submit(group), strict=True))
        branches: dict[str, tuple[Place, int]] = {}  # by the id of the branch's prompt: its place and its sample number
        pending = engines.open(group_size=1, sampling=sampling)
        firsts = [[response for response, _ in found[prompt.id]] for prompt in prompts]
        for name, places in _places(run, firsts).items():
            draw = random.Random(derive_seed(run.config.seed, seed_name, "branch", name))
            chosen = draw.sample(places, min(num_branches, len(places)))
            chosen += draw.choices(places or [(found[name][0][0], 0)], k=num_branches - len(chosen))
            for sample, place in enumerate(chosen, start=num_first):
                prompt = replace(prompt_at(*place), id=f"{name} branch {sample}")
                branches[prompt.id] = (place, sample)
                pending.add([prompt], seed_name)
        for (continuation,) in pending:
            (parent, num_tokens), sample = branches[continuation.prompt.id]
            response = joined(parent, num_tokens, continuation, sample)
            found[parent.prompt.id] += zip([response], run.rewards.submit([response]), strict=True)
    for checked in found.values():
        checked.sort(key=lambda pair: pair[0].sample)
    return collected(prompts, found, run.rewards, run.clock)


def _places(run: Run, groups: Sequence[list[Rollout]]) -> dict[str, list[Place]]:
    """For each prompt the places behind the first token where a segment of one of its responses opens."""
    rollouts = [rollout for group in groups for rollout in group]
    batch = Batch.of(rollouts, [0.0] * len(rollouts))
    unscored = Scores(old_logprobs=None, values=None, ref_logprobs=None)
    opens = segment(run.config.algorithm.segmenter, batch, unscored).split(batch.lengths.tolist())
    places: dict[str, list[Place]] = {group[0].prompt.id: [] for group in groups}
    for rollout, own in zip(rollouts, opens, strict=True):
        at = (own[1:] > 0).nonzero().flatten() + 1
        places[rollout.prompt.id] += [(rollout, num_tokens) for num_tokens in at.tolist()]
    return places
