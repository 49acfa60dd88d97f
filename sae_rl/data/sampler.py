"""Hands out prompts, epoch after epoch, and remembers where it was."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Protocol, TypedDict, cast

from sae_rl.types import Prompt


class SamplerState(TypedDict):
    """Everything that decides the next prompts; plain values, fit for JSON. Each kind of sampler adds its own keys."""

    kind: str
    epoch: int
    levels: list[int]  # of the curricula, in their order


class PromptSampler(Protocol):
    """What a run draws its prompts from."""

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        """All that it draws from now, in their own order."""
        ...

    @property
    def epoch(self) -> int: ...

    def next(self, num_prompts: int) -> list[Prompt]:
        """Different prompts, at most as many as `prompts` has. Raises ValueError for other numbers."""
        ...

    def put_back(self, prompts: Sequence[Prompt]) -> None:
        """Prompts that were handed out and are not used now: they come before others, in this order."""
        ...

    def observe(self, prompts: Sequence[Prompt], scores: Sequence[float]) -> None:
        """What the policy scored: of each prompt the mean of its group."""
        ...

    def state(self, unused: Sequence[Prompt] = ()) -> SamplerState:
        """Where it is; as if the prompts ``unused``, which it handed out, had been put back."""
        ...

    def load_state(self, state: SamplerState) -> None:
        """Goes on exactly where ``state`` was taken. Raises ValueError if it is of other prompts or another seed."""
        ...

    def anew(self, seed: int) -> PromptSampler:
        """One that begins, with the same prompts in another order."""
        ...


class ShuffleState(SamplerState):
    seed: int
    fingerprint: str  # of the data set, since positions in another one mean nothing
    position: int  # prompts of this epoch that were handed out
    postponed: list[int]  # moved to the end of this epoch: the batch that began it held them already
    pending: list[int]  # handed out and put back: the next ones to hand out


class Sampler:
    """Goes through a shuffled list of prompts; every epoch has its own order, decided by (seed, epoch).

    A batch that reaches the end of an epoch goes on in the next one, so no prompt is ever dropped, and one batch never
    holds a prompt twice.
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
        again: list[int] = []  # a prompt of an epoch ago that was put back, and comes in this epoch as well
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
        """Prompts that were handed out and are not used now: they come before all others, in this order."""
        self._pending = [self._index[prompt.id] for prompt in prompts] + self._pending

    def observe(self, prompts: Sequence[Prompt], scores: Sequence[float]) -> None:
        """Scores change nothing here."""

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
        """Goes on exactly where ``state`` was taken.

        Raises:
            ValueError: the state belongs to other prompts or to another seed.
        """
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
    """Raises ValueError unless a sampler of this kind saved the state."""
    if state["kind"] != kind:
        raise ValueError(
            f"the saved sampler is a {state['kind']}, this one a {kind}; resume with the same sources, or start anew"
        )


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """Differs when the prompts, their order or their answers differ."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(repr((prompt.id, prompt.text, prompt.answer)).encode())
    return digest.hexdigest()[:16]
