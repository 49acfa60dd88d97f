"""A sampler that draws prompts of one level, and of the next level when the policy solves enough of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

from sae_rl.data.sampler import Sampler, SamplerState, check_kind, check_num_prompts
from sae_rl.seeds import derive_seed
from sae_rl.types import Prompt


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
        assert levels and window_prompts >= 1, "checked with the configuration"
        self._samplers = {level: Sampler(prompts, derive_seed(seed, level)) for level, prompts in levels.items()}
        self._level_of = {prompt.id: level for level, prompts in levels.items() for prompt in prompts}
        self._promote_at, self._window_prompts = promote_at, window_prompts
        self._window: deque[float] = deque(maxlen=window_prompts)  # scores of the last prompts of this level
        self.level = min(levels)

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        """The prompts of the current level."""
        return self._samplers[self.level].prompts

    @property
    def epoch(self) -> int:
        return self._samplers[self.level].epoch

    def anew(self, seed: int) -> CurriculumSampler:
        levels = {level: sampler.prompts for level, sampler in self._samplers.items()}
        return CurriculumSampler(levels, seed, promote_at=self._promote_at, window_prompts=self._window_prompts)

    def next(self, num_prompts: int) -> list[Prompt]:
        check_num_prompts(num_prompts, len(self.prompts), "the data set")
        drawn: list[Prompt] = []
        for level, sampler in self._samplers.items():
            missing = num_prompts - len(drawn)
            # An earlier level gives what was put back. Nothing was drawn from a later one, so nothing is pending there.
            if count := missing if level == self.level else min(sampler.num_pending, missing):
                drawn += sampler.next(count)
        return drawn

    def put_back(self, prompts: Sequence[Prompt]) -> None:
        for level, sampler in self._samplers.items():
            sampler.put_back(self._at_level(level, prompts))

    def observe(self, prompts: Sequence[Prompt], scores: Sequence[float]) -> None:
        for prompt, score in zip(prompts, scores, strict=True):
            if self._level_of[prompt.id] != self.level:
                continue
            self._window.append(score)
            is_full = len(self._window) == self._window_prompts
            later = [level for level in self._samplers if level > self.level]
            if later and is_full and sum(self._window) / len(self._window) >= self._promote_at:
                self.level = later[0]
                self._window.clear()

    def state(self, unused: Sequence[Prompt] = ()) -> SamplerState:
        return {
            "kind": "curriculum",
            "epoch": self.epoch,
            "levels": [self.level],
            "window": list(self._window),
            "samplers": [sampler.state(self._at_level(level, unused)) for level, sampler in self._samplers.items()],
        }

    def load_state(self, state: SamplerState) -> None:
        check_kind(state, "curriculum")
        (level,), levels = state["levels"], list(self._samplers)
        if len(state["samplers"]) != len(levels) or level not in levels:
            raise ValueError(
                f"the saved sampler has {len(state['samplers'])} levels and is at {level}, this one has levels {levels}; "
                "resume with the same levels, or start anew"
            )
        for sampler, own in zip(self._samplers.values(), state["samplers"], strict=True):
            sampler.load_state(own)
        self.level = level
        self._window.clear()
        self._window.extend(state["window"])

    def _at_level(self, level: int, prompts: Sequence[Prompt]) -> list[Prompt]:
        return [prompt for prompt in prompts if self._level_of[prompt.id] == level]
