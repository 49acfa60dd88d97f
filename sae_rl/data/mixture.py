"""A sampler that draws from several samplers by weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import cast

from sae_rl.data.sampler import PromptSampler, SamplerState, check_kind
from sae_rl.seeds import derive_seed
from sae_rl.types import Prompt


class MixtureState(SamplerState):
    counts: dict[str, int]  # part -> prompts drawn from it and not put back
    weights: dict[str, float]
    samplers: dict[str, SamplerState]


class MixtureSampler:
    """Draws each prompt from the part that is furthest behind its share of all prompts so far.

    The count of a part differs from its share by less than the number of parts, and over many batches shares are exact.
    A part whose prompts are all in a batch gives no more to this batch, and catches up in later ones.

    Args:
        parts: name -> sampler. `Prompt.task` of its prompts is the name.
        weights: name -> share; they need not add up to one.
    """

    def __init__(self, parts: Mapping[str, PromptSampler], weights: Mapping[str, float]) -> None:
        if not parts or parts.keys() != weights.keys() or min(weights.values()) <= 0:
            raise ValueError(
                f"a mixture needs parts with a weight above 0 each, found {list(parts)} and {dict(weights)}"
            )
        self._parts, self._weights = dict(parts), dict(weights)
        total = sum(map(Fraction, weights.values()))
        self._shares = {name: Fraction(weight) / total for name, weight in weights.items()}
        self._counts = dict.fromkeys(parts, 0)

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        return tuple(prompt for part in self._parts.values() for prompt in part.prompts)

    @property
    def epoch(self) -> int:
        """The epoch of the part with the fewest passes."""
        return min(part.epoch for part in self._parts.values())

    def anew(self, seed: int) -> MixtureSampler:
        return MixtureSampler(
            {name: part.anew(derive_seed(seed, name)) for name, part in self._parts.items()}, self._weights
        )

    def next(self, num_prompts: int) -> list[Prompt]:
        sizes = {name: len(part.prompts) for name, part in self._parts.items()}
        if not 1 <= num_prompts <= sum(sizes.values()):
            raise ValueError(
                f"a step asks for {num_prompts} prompts, allowed: 1 to {sum(sizes.values())}, the size of all parts; ask for "
                "fewer prompts per step or give more data"
            )
        order: list[str] = []
        taken = dict.fromkeys(self._parts, 0)
        for done in range(sum(self._counts.values()) + 1, sum(self._counts.values()) + num_prompts + 1):
            name = self._furthest_behind([name for name in self._parts if taken[name] < sizes[name]], done)
            self._counts[name] += 1
            taken[name] += 1
            order.append(name)
        drawn = {name: iter(self._parts[name].next(count)) for name, count in taken.items() if count}
        return [next(drawn[name]) for name in order]

    def _furthest_behind(self, names: Sequence[str], done: int) -> str:
        """The part whose count is furthest below its share of ``done`` prompts; the first of equals."""
        return max(names, key=lambda name: self._shares[name] * done - self._counts[name])

    def put_back(self, prompts: Sequence[Prompt]) -> None:
        for name, own in self._by_part(prompts).items():
            self._parts[name].put_back(own)
            self._counts[name] -= len(own)

    def observe(self, prompts: Sequence[Prompt], scores: Sequence[float]) -> None:
        score_of = {prompt.id: score for prompt, score in zip(prompts, scores, strict=True)}
        for name, own in self._by_part(prompts).items():
            self._parts[name].observe(own, [score_of[prompt.id] for prompt in own])

    def state(self, unused: Sequence[Prompt] = ()) -> MixtureState:
        own = self._by_part(unused)
        samplers = {name: part.state(own[name]) for name, part in self._parts.items()}
        return MixtureState(
            kind="mixture",
            epoch=self.epoch,
            levels=[level for state in samplers.values() for level in state["levels"]],
            counts={name: count - len(own[name]) for name, count in self._counts.items()},
            weights=dict(self._weights),
            samplers=samplers,
        )

    def load_state(self, state: SamplerState) -> None:
        check_kind(state, "mixture")
        saved = cast(MixtureState, state)
        if saved["weights"] != self._weights:
            raise ValueError(
                f"the saved mixture has the weights {saved['weights']}, this one {self._weights}; resume with the same parts "
                "and weights, or start anew"
            )
        for name, part in self._parts.items():
            try:
                part.load_state(saved["samplers"][name])
            except ValueError as error:
                raise ValueError(f"part {name!r}: {error}") from error
        self._counts = dict(saved["counts"])

    def _by_part(self, prompts: Sequence[Prompt]) -> dict[str, list[Prompt]]:
        own: dict[str, list[Prompt]] = {name: [] for name in self._parts}
        for prompt in prompts:
            own[prompt.task].append(prompt)
        return own
