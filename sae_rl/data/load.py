"""From a task's sources to the sampler and the held-out prompts of a run; everything that is wrong is said at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from sae_rl.config.schema import Config
from sae_rl.data.curriculum import CurriculumSampler
from sae_rl.data.files import File
from sae_rl.data.layouts import LAYOUTS
from sae_rl.data.mixture import MixtureSampler
from sae_rl.data.prompts import Gym, Problems, load_prompts
from sae_rl.data.sampler import PromptSampler, Sampler
from sae_rl.data.sources import (
    AnySource,
    FileSource,
    MixtureSource,
    PartSource,
    ProceduralSource,
    ReasoningGymSource,
    ShapedSource,
)
from sae_rl.data.templates import Shape
from sae_rl.reasoning_gym.puzzles import PuzzleProcess, Puzzles
from sae_rl.rewards.table import check_verifier, resolve
from sae_rl.seeds import derive_seed
from sae_rl.settings import BadKeys, ConfigError
from sae_rl.tasks.table import make_task
from sae_rl.types import Prompt


def load_task(config: Config, tokenizer: PreTrainedTokenizerBase) -> tuple[PromptSampler, list[Prompt]]:
    """What a run draws its prompts from, and the prompts that it is evaluated on: none if it never is.

    Raises:
        ConfigError: everything that is wrong with the files and the keys of both sources.
    """
    with _Loader(config, tokenizer) as loader:
        assert config.task.train is not None, "checked with the configuration"
        sampler = loader.sampler(config.task.train, "task.train", config.seed)
        evaluated = config.task.evaluation if config.evaluation.every_steps else None
        heldout = [] if evaluated is None else loader.heldout(evaluated)
    assert sampler is not None, "without a sampler there was a problem"
    return sampler, heldout


def load_heldout(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """The prompts of ``task.evaluation``. Raises ConfigError as `load_task`."""
    assert config.task.evaluation is not None, "checked with the configuration"
    with _Loader(config, tokenizer) as loader:
        return loader.heldout(config.task.evaluation)


class _Loader:
    """Loads sources one after the other, and keeps what is wrong with them until its block ends."""

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase) -> None:
        self._config, self._tokenizer = config, tokenizer
        self._problems: list[str] = []
        self._process = PuzzleProcess()
        self._check_reward = cache(self._check)

    def __enter__(self) -> _Loader:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._process.__exit__()
        if kind is None and self._problems:
            raise ConfigError(list(dict.fromkeys(self._problems)))  # levels of a curriculum may share one

    def _check(self, reward: str) -> None:
        rewards = self._config.rewards
        check_verifier(reward, resolve(reward, rewards.verifiers), rewards.deadline_s)

    def sampler(self, source: AnySource, key: str, seed: int) -> PromptSampler | None:
        """What a source is drawn from in training; None: something is wrong with it."""
        if not isinstance(source, MixtureSource):
            return self._sampler_of(source, key, seed, 1.0, None)
        weights = {name: 1.0 if part.weight is None else part.weight for name, part in source.parts.items()}
        total = sum(weights.values())
        parts = {
            name: self._sampler_of(part, f"{key}.parts.{name}", derive_seed(seed, name), weights[name] / total, name)
            for name, part in source.parts.items()
        }
        loaded = {name: part for name, part in parts.items() if part is not None}
        return MixtureSampler(loaded, weights) if len(loaded) == len(parts) else None

    def heldout(self, source: AnySource) -> list[Prompt]:
        """All prompts of a source, part after part."""
        key = "task.evaluation"
        if not isinstance(source, MixtureSource):
            return self._prompts(source, key)
        return [
            prompt
            for name, part in source.parts.items()
            for prompt in _of_part(name, self._prompts(part, f"{key}.parts.{name}"))
        ]

    def _sampler_of(
        self, source: PartSource, key: str, seed: int, share: float, part: str | None
    ) -> PromptSampler | None:
        if not isinstance(source, ReasoningGymSource) or source.curriculum is None:
            prompts = _of_part(part, self._prompts(source, key))
            return Sampler(prompts, seed) if prompts and self._enough(key, len(prompts), share) else None
        levels = {level: _of_part(part, self._prompts(source, key, level)) for level in source.curriculum.levels}
        if not all(levels.values()) or not self._enough(key, min(map(len, levels.values())), share):
            return None
        curriculum = source.curriculum
        return CurriculumSampler(
            levels, seed, promote_at=curriculum.promote_at, window_prompts=curriculum.window_prompts
        )

    def _prompts(self, source: PartSource, key: str, level: int | None = None) -> list[Prompt]:
        """Of one source; none if something is wrong with it, which is kept."""
        task = self._config.task
        if source.reward is not None:
            try:
                self._check_reward(source.reward)
            except ValueError as error:
                self._problems.append(f"{key}.{error}")  # it begins with the word reward
        with self._kept(key):
            prompts = load_prompts(
                _described(source, level),
                self._tokenizer,
                task.max_prompt_tokens,
                task.overlong_prompts,
                process=self._process,
                check_reward=self._check_reward,
            )
            if isinstance(source, ProceduralSource) and source.reward is not None:
                prompts = [replace(prompt, reward=source.reward) for prompt in prompts]
            return prompts
        return []

    @contextlib.contextmanager
    def _kept(self, key: str) -> Iterator[None]:
        try:
            yield
        except BadKeys as error:
            self._problems += [f"{key}.{line}" for line in str(error).splitlines()]
        except ValueError as error:
            self._problems += [f"{key}: {line}" for line in str(error).splitlines()]

    def _enough(self, key: str, num_prompts: int, share: float) -> bool:
        """Whether a source that gives ``share`` of the prompts has as many as are asked for at once."""
        config = self._config
        wanted = {
            "rollout.prompts_per_step": config.rollout.prompts_per_step,
            "rollout.prompts_under_way": config.rollout.prompts_under_way or 0,
        }
        if config.algorithm.needs_critic and config.learner.critic_pretraining.checkpoint is None:
            wanted["learner.critic_pretraining.num_prompts"] = config.learner.critic_pretraining.num_prompts
        problems = [
            f"{name} = {count}, but {key} has {num_prompts} prompts"
            + (f" for its share of {share:.0%}" if share < 1 else "")
            for name, count in wanted.items()
            if int(count * share) > num_prompts
        ]
        self._problems += problems
        return not problems


def _of_part(name: str | None, prompts: list[Prompt]) -> list[Prompt]:
    """Of a mixture: ids differ from those of other parts, and the task is the part."""
    if name is None:
        return prompts
    return [replace(prompt, id=f"{name}/{prompt.id}", task=name) for prompt in prompts]


def _described(source: PartSource, level: int | None) -> Problems | File | Gym:
    """A source as `load_prompts` takes it. ``level``: of its curriculum."""
    if isinstance(source, FileSource):
        return File(
            path=source.path,
            reward=source.reward,
            task=Path(source.path).stem,
            layout=LAYOUTS[source.layout].with_columns(source.columns.model_dump()),
            shape=_shape(source),
            duplicates=source.duplicates,
            split=source.split,
            subset=source.subset,
            num_prompts=source.num_prompts,
        )
    if isinstance(source, ReasoningGymSource):
        puzzles = Puzzles(
            task=source.task,
            num_prompts=source.num_prompts,
            knobs=source.knobs,
            levels=source.levels if level is None else level,
            split=source.split,
            seed=source.seed,
        )
        return Gym(puzzles=puzzles, reward=source.reward, shape=_shape(source))
    task = make_task(source.name, source.knobs)
    return Problems(task=task, num_prompts=source.num_prompts, split=source.split, seed=source.seed)


def _shape(source: ShapedSource) -> Shape:
    return Shape(template=source.template, system_prompt=source.system_prompt, chat=source.chat)
