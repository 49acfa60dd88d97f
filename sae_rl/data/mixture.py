"""A sampler that draws from several samplers by weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction

from sae_rl.data.sampler import PromptSampler, SamplerState, check_kind, check_num_prompts
from sae_rl.seeds import derive_seed
from sae_rl.types import Prompt


class MixtureSampler:
    """Draws each prompt from the part that is furthest behind its share of all prompts so far.

    The count of a part differs from its share by less than the number of parts, and over many batches shares are exact.
    A part whose prompts are all in a batch gives no more to this batch, and catches up in later ones.

    Args:
        parts: name -> sampler. `Prompt.task` of its prompts is the name.
        weights: name -> share; they need not add up to one.
    """

    def __init__(self, parts: Mapping[str, PromptSampler], weights: Mapping[str, float]) -> None:
        assert parts and parts.keys() == weights.keys() and min(weights.values()) > 0, "each part has a weight above 0"
        self._parts, self._weights = dict(parts), dict(weights)
        total = sum(map(Fraction, weights.values()))
        self._shares = {name: Fraction(weight) / total for name, weight in weights.items()}
        self._counts = dict.fromkeys(parts, 0)  # prompts drawn from each part and not put back

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        return tuple(prompt for part in self._parts.values() for prompt in part.prompts)

    @property
    def epoch(self) -> int:
        """The epoch of the part with the fewest passes."""
        return min(part.epoch for part in self._parts.values())

    def anew(self, seed: int) -> MixtureSampler:
        parts = {name: part.anew(derive_seed(seed, name)) for name, part in self._parts.items()}
        return MixtureSampler(parts, self._weights)

    def next(self, num_prompts: int) -> list[Prompt]:
        left = {name: len(part.prompts) for name, part in self._parts.items()}
        check_num_prompts(num_prompts, sum(left.values()), "all parts")
        order: list[str] = []
        for _ in range(num_prompts):
            total = sum(self._counts.values()) + 1
            behind = {name: self._shares[name] * total - self._counts[name] for name in left if left[name]}
            name = max(behind, key=behind.__getitem__)  # the first of equals
            self._counts[name] += 1
            left[name] -= 1
            order.append(name)
        drawn = {name: iter(self._parts[name].next(order.count(name))) for name in dict.fromkeys(order)}
        return [next(drawn[name]) for name in order]

    def put_back(self, prompts: Sequence[Prompt]) -> None:
        for name, part in self._parts.items():
            own = _of_part(name, prompts)
            part.put_back(own)
            self._counts[name] -= len(own)

    def observe(self, prompts: Sequence[Prompt], scores: Sequence[float]) -> None:
        score_of = {prompt.id: score for prompt, score in zip(prompts, scores, strict=True)}
        for name, part in self._parts.items():
            own = _of_part(name, prompts)
            part.observe(own, [score_of[prompt.id] for prompt in own])

    def state(self, unused: Sequence[Prompt] = ()) -> SamplerState:
        samplers = {name: part.state(_of_part(name, unused)) for name, part in self._parts.items()}
        return {
            "kind": "mixture",
            "epoch": self.epoch,
            "levels": [level for state in samplers.values() for level in state["levels"]],
            "counts": {name: count - len(_of_part(name, unused)) for name, count in self._counts.items()},
            "weights": self._weights,
            "samplers": samplers,
        }

    def load_state(self, state: SamplerState) -> None:
        check_kind(state, "mixture")
        if state["weights"] != self._weights:
            raise ValueError(
                f"the saved mixture has the weights {state['weights']}, this one {self._weights}; resume with the same parts "
                "and weights, or start anew"
            )
        for name, part in self._parts.items():
            try:
                part.load_state(state["samplers"][name])
            except ValueError as error:
                raise ValueError(f"part {name!r}: {error}") from error
        self._counts = dict(state["counts"])


def _of_part(name: str, prompts: Sequence[Prompt]) -> list[Prompt]:
    return [prompt for prompt in prompts if prompt.task == name]
