"""Draws the prompts of each step, and can save and restore its position."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Protocol, TypedDict, cast

from sae_rl.types import Prompt


class SamplerState(TypedDict):
    """Everything that decides the next prompts, as plain values for JSON. Each kind of sampler adds its own keys."""

    kind: str
    epoch: int
    levels: list[int]  # the current level of each curriculum


class PromptSampler(Protocol):
    """The source of a run's prompts."""

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        """The prompts that it draws from at present, unshuffled."""
        ...

    @property
    def epoch(self) -> int: ...

    def next(self, num_prompts: int) -> list[Prompt]:
        """``num_prompts`` different prompts. Raises ValueError if that is below 1 or above the number of `prompts`."""
        ...

    def put_back(self, prompts: Sequence[Prompt]) -> None:
        """Returns drawn prompts that were not used. They come next, in this order."""
        ...

    def observe(self, prompts: Sequence[Prompt], scores: Sequence[float]) -> None:
        """Reports the policy's scores: for each prompt the mean of its group."""
        ...

    def state(self, unused: Sequence[Prompt] = ()) -> SamplerState:
        """Its position, as if the drawn prompts ``unused`` had been put back."""
        ...

    def load_state(self, state: SamplerState) -> None:
        """Continues exactly where ``state`` was taken. Raises ValueError if it has other prompts or another seed."""
        ...

    def anew(self, seed: int) -> PromptSampler:
        """A new sampler of the same prompts, with another seed."""
        ...


class ShuffleState(SamplerState):
    seed: int
    fingerprint: str  # of the prompts: a position among other prompts means nothing
    position: int  # prompts drawn in this epoch
    postponed: list[int]  # moved to the end of this epoch, because the batch that began it held them already
    pending: list[int]  # drawn and put back: the next ones to draw


class Sampler:
    """Draws from a shuffled list of prompts. Every epoch has an order of its own, which (seed, epoch) decides.

    A batch that reaches the end of an epoch continues in the next one, so no prompt is dropped. No batch holds a prompt
    twice.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        if not prompts:
            raise ValueError("the sampler needs at least one prompt, found none")
        self._prompts = tuple(prompts)
        self._seed = seed
        self._position = 0
        self._fingerprint = fingerprint(self._prompts)
        self._pending: list[int] = []
        self._index = {prompt.id: i for i, prompt in enumerate(self._prompts)}
        self._begin(epoch=0, position=0, postponed=[])

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        """The data set, in its own order."""
        return self._prompts

    @property
    def epoch(self) -> int:
        return self._epoch

    @property
    def num_pending(self) -> int:
        """Different prompts that were put back and come next."""
        return len(set(self._pending))

    def anew(self, seed: int) -> Sampler:
        return Sampler(self._prompts, seed)

    def next(self, num_prompts: int) -> list[Prompt]:
        """The next ``num_prompts`` prompts.

        Raises:
            ValueError: fewer than one, or more than the data set holds.
        """
        if not 1 <= num_prompts <= len(self._prompts):
            raise ValueError(
                f"a step asks for {num_prompts} prompts, allowed: 1 to {len(self._prompts)}, the size of the data set; "
                "ask for fewer prompts per step or give more data"
            )
        chosen: list[int] = []
        again: list[int] = []  # prompts that were put back in the last epoch and come in this one as well
        while len(chosen) < num_prompts:
            i = self._pending.pop(0) if self._pending else self._draw(chosen)
            (again if i in chosen else chosen).append(i)
        self._pending = again + self._pending
        return [self._prompts[i] for i in chosen]

    def _draw(self, chosen: list[int]) -> int:
        if self._position == len(self._order):
            self._begin(epoch=self._epoch + 1, position=0, postponed=chosen)
        self._position += 1
        return self._order[self._position - 1]

    def put_back(self, prompts: Sequence[Prompt]) -> None:
        """Returns drawn prompts that were not used. They come next, in this order."""
        self._pending = [self._index[prompt.id] for prompt in prompts] + self._pending

    def observe(self, prompts: Sequence[Prompt], scores: Sequence[float]) -> None:
        """Does nothing: scores do not change the order."""

    def state(self, unused: Sequence[Prompt] = ()) -> ShuffleState:
        return ShuffleState(
            kind="shuffle",
            epoch=self._epoch,
            levels=[],
            seed=self._seed,
            fingerprint=self._fingerprint,
            position=self._position,
            postponed=list(self._postponed),
            pending=[self._index[prompt.id] for prompt in unused] + self._pending,
        )

    def load_state(self, state: SamplerState) -> None:
        """Continues exactly where ``state`` was taken. Raises ValueError if it has other prompts or another seed."""
        check_kind(state, "shuffle")
        saved = cast(ShuffleState, state)
        if saved["fingerprint"] != self._fingerprint:
            raise ValueError(
                "the saved sampler walked through other prompts than these; resume with the same data, or start anew"
            )
        if saved["seed"] != self._seed:
            raise ValueError(f"the saved sampler has seed {saved['seed']}, this one {self._seed}; use the saved seed")
        self._begin(saved["epoch"], saved["position"], saved["postponed"])
        self._pending = list(saved["pending"])

    def _begin(self, epoch: int, position: int, postponed: Sequence[int]) -> None:
        order = list(range(len(self._prompts)))
        random.Random(f"{self._seed}/{epoch}").shuffle(order)
        last = set(postponed)
        self._order = [i for i in order if i not in last] + [i for i in order if i in last]
        self._epoch, self._position, self._postponed = epoch, position, list(postponed)


def check_kind(state: SamplerState, kind: str) -> None:
    """Raises ValueError if a sampler of another kind saved the state."""
    if state["kind"] != kind:
        raise ValueError(
            f"the saved sampler is a {state['kind']}, this one a {kind}; resume with the same sources, or start anew"
        )


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """A hash of the prompts, their answers and their order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(repr((prompt.id, prompt.text, prompt.answer)).encode())
    return digest.hexdigest()[:16]
