"""Draws the prompts of each step, and can save and restore its position."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Any, Protocol

from sae_rl.types import Prompt

# Everything that decides the next prompts, as plain values for JSON: the sampler's kind, its epoch, the current level of
# each curriculum in levels, and the keys that each kind adds.
SamplerState = dict[str, Any]


class PromptSampler(Protocol):
    """The source of a run's prompts."""

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        """The prompts that it draws from at present, unshuffled."""

    @property
    def epoch(self) -> int: ...

    def next(self, num_prompts: int) -> list[Prompt]:
        """``num_prompts`` different prompts. Raises ValueError if that is below 1 or above the number of `prompts`."""

    def put_back(self, prompts: Sequence[Prompt]) -> None:
        """Returns drawn prompts that were not used. They come next, in this order."""

    def observe(self, prompts: Sequence[Prompt], scores: Sequence[float]) -> None:
        """Reports the policy's scores: for each prompt the mean of its group."""

    def state(self, unused: Sequence[Prompt] = ()) -> SamplerState:
        """Its position, as if the drawn prompts ``unused`` had been put back."""

    def load_state(self, state: SamplerState) -> None:
        """Continues exactly where ``state`` was taken. Raises ValueError if it has other prompts or another seed."""

    def anew(self, seed: int) -> PromptSampler:
        """A new sampler of the same prompts, with another seed."""


class Sampler:
    """Draws from a shuffled list of prompts. Every epoch has an order of its own, which (seed, epoch) decides.

    A batch that reaches the end of an epoch continues in the next one, so no prompt is dropped. No batch holds a prompt
    twice: prompts that a batch holds already when an epoch begins move to the end of that epoch.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        if not prompts:
            raise ValueError("the sampler needs at least one prompt, found none")
        self.prompts = tuple(prompts)
        self._seed = seed
        self._fingerprint = _fingerprint(prompts)
        self._index = {prompt.id: i for i, prompt in enumerate(prompts)}
        self._pending: list[int] = []  # drawn and put back: the next ones to draw
        self._begin(epoch=0, position=0, postponed=[])

    @property
    def num_pending(self) -> int:
        """Different prompts that were put back and come next."""
        return len(set(self._pending))

    def anew(self, seed: int) -> Sampler:
        return Sampler(self.prompts, seed)

    def next(self, num_prompts: int) -> list[Prompt]:
        check_num_prompts(num_prompts, len(self.prompts), "the data set")
        chosen: list[int] = []
        again: list[int] = []  # prompts that were put back in the last epoch and come in this one as well
        while len(chosen) < num_prompts:
            i = self._pending.pop(0) if self._pending else self._draw(chosen)
            (again if i in chosen else chosen).append(i)
        self._pending = again + self._pending
        return [self.prompts[i] for i in chosen]

    def _draw(self, chosen: list[int]) -> int:
        if self._position == len(self._order):
            self._begin(epoch=self.epoch + 1, position=0, postponed=chosen)
        self._position += 1
        return self._order[self._position - 1]

    def put_back(self, prompts: Sequence[Prompt]) -> None:
        self._pending = [self._index[prompt.id] for prompt in prompts] + self._pending

    def observe(self, prompts: Sequence[Prompt], scores: Sequence[float]) -> None:
        """Does nothing: scores do not change the order."""

    def state(self, unused: Sequence[Prompt] = ()) -> SamplerState:
        return {
            "kind": "shuffle",
            "epoch": self.epoch,
            "levels": [],
            "seed": self._seed,
            "fingerprint": self._fingerprint,
            "position": self._position,
            "postponed": self._postponed,
            "pending": [self._index[prompt.id] for prompt in unused] + self._pending,
        }

    def load_state(self, state: SamplerState) -> None:
        check_kind(state, "shuffle")
        if state["fingerprint"] != self._fingerprint:
            raise ValueError("the saved sampler had other prompts; resume with the same data, or start anew")
        if state["seed"] != self._seed:
            raise ValueError(f"the saved sampler has seed {state['seed']}, this one {self._seed}; use the saved seed")
        self._begin(state["epoch"], state["position"], state["postponed"])
        self._pending = list(state["pending"])

    def _begin(self, epoch: int, position: int, postponed: Sequence[int]) -> None:
        order = list(range(len(self.prompts)))
        random.Random(f"{self._seed}/{epoch}").shuffle(order)
        self._order = sorted(order, key=set(postponed).__contains__)  # a stable sort: the postponed ones come last
        self._position = position  # prompts drawn in this epoch
        self._postponed = list(postponed)
        self.epoch = epoch


def check_num_prompts(num_prompts: int, size: int, whole: str) -> None:
    """Raises ValueError unless ``size`` prompts, the size of ``whole``, are enough for a step."""
    if not 1 <= num_prompts <= size:
        raise ValueError(
            f"a step asks for {num_prompts} prompts, allowed: 1 to {size}, the size of {whole}; ask for fewer prompts per "
            "step or give more data"
        )


def check_kind(state: SamplerState, kind: str) -> None:
    """Raises ValueError if a sampler of another kind saved the state."""
    if state["kind"] != kind:
        raise ValueError(
            f"the saved sampler is a {state['kind']}, this one a {kind}; resume with the same sources, or start anew"
        )


def _fingerprint(prompts: Sequence[Prompt]) -> str:
    """A hash of the prompts, their answers and their order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(repr((prompt.id, prompt.text, prompt.answer)).encode())
    return digest.hexdigest()[:16]
