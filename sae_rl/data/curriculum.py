"""A sampler that draws prompts of one level, and of the next level when the policy solves enough of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from sae_rl.data.sampler import Sampler, SamplerState, ShuffleState, check_kind
from sae_rl.seeds import derive_seed
from sae_rl.types import Prompt


class CurriculumState(SamplerState):
    window: list[float]  # scores of the last prompts of this level
    samplers: list[ShuffleState]  # one of each level


class CurriculumSampler:
    """Moves to the next level as soon as the mean score of the level's last prompts reaches ``promote_at``.

    It never moves back. Prompts of an earlier level that were put back still come first, but their scores do not count.

    Args:
        levels: level -> its prompts, from easy to hard.
        promote_at: the mean score that ends a level.
        window_prompts: the number of prompts that the mean is over.
    """

    def __init__(
        self, levels: Mapping[int, Sequence[Prompt]], seed: int, *, promote_at: float, window_prompts: int
    ) -> None:
        if not levels or window_prompts < 1:
            raise ValueError(
                f"a curriculum needs levels and window_prompts >= 1, found {list(levels)}, {window_prompts}"
            )
        self._levels = {level: tuple(prompts) for level, prompts in levels.items()}
        self._names = list(levels)
        self._promote_at, self._window_prompts = promote_at, window_prompts
        self._samplers = [Sampler(prompts, derive_seed(seed, level)) for level, prompts in levels.items()]
        self._level_of = {prompt.id: i for i, prompts in enumerate(levels.values()) for prompt in prompts}
        self._at = 0  # index into _names
        self._window: list[float] = []

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        """The prompts of the current level."""
        return self._samplers[self._at].prompts

    @property
    def epoch(self) -> int:
        return self._samplers[self._at].epoch

    @property
    def level(self) -> int:
        return self._names[self._at]

    def anew(self, seed: int) -> CurriculumSampler:
        return CurriculumSampler(self._levels, seed, promote_at=self._promote_at, window_prompts=self._window_prompts)

    def next(self, num_prompts: int) -> list[Prompt]:
        if not 1 <= num_prompts <= len(self.prompts):
            return self._samplers[self._at].next(num_prompts)  # raises
        drawn: list[Prompt] = []
        for sampler in self._samplers[: self._at]:
            if left := min(sampler.num_pending, num_prompts - len(drawn)):
                drawn += sampler.next(left)
        if left := num_prompts - len(drawn):
            drawn += self._samplers[self._at].next(left)
        return drawn

    def put_back(self, prompts: Sequence[Prompt]) -> None:
        for i, own in self._by_level(prompts).items():
            self._samplers[i].put_back(own)

    def observe(self, prompts: Sequence[Prompt], scores: Sequence[float]) -> None:
        for prompt, score in zip(prompts, scores, strict=True):
            if self._level_of[prompt.id] != self._at:
                continue
            self._window = [*self._window, score][-self._window_prompts :]
            full = len(self._window) == self._window_prompts
            if full and sum(self._window) / len(self._window) >= self._promote_at and self._at + 1 < len(self._names):
                self._at += 1
                self._window = []

    def state(self, unused: Sequence[Prompt] = ()) -> CurriculumState:
        own = self._by_level(unused)
        return CurriculumState(
            kind="curriculum",
            epoch=self.epoch,
            levels=[self.level],
            window=list(self._window),
            samplers=[sampler.state(own.get(i, ())) for i, sampler in enumerate(self._samplers)],
        )

    def load_state(self, state: SamplerState) -> None:
        check_kind(state, "curriculum")
        saved = cast(CurriculumState, state)
        if len(saved["samplers"]) != len(self._samplers) or saved["levels"][0] not in self._names:
            raise ValueError(
                f"the saved sampler has {len(saved['samplers'])} levels and is at {saved['levels'][0]}, this one has levels "
                f"{self._names}; resume with the same levels, or start anew"
            )
        for sampler, own in zip(self._samplers, saved["samplers"], strict=True):
            sampler.load_state(own)
        self._at, self._window = self._names.index(saved["levels"][0]), list(saved["window"])

    def _by_level(self, prompts: Sequence[Prompt]) -> dict[int, list[Prompt]]:
        own: dict[int, list[Prompt]] = {}
        for prompt in prompts:
            own.setdefault(self._level_of[prompt.id], []).append(prompt)
        return own
