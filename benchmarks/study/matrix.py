"""The matrix of the study: which commands make which base models, critics and runs, and in which order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import yaml

FILE = Path(__file__).with_name("matrix.yaml")
TUNED, TUNING, GOOD = "study", "tuning", "good"  # folders of curves whose runs tuning sets, and of tuning; a critic


@dataclass(frozen=True, slots=True)
class Run:
    """One ``sae-rl train``: an arm on a task, at a size, with a seed and a critic."""

    arm: str
    task: str
    size: str
    seed: int
    critic: str = GOOD
    setting: str | None = None  # a run of tuning has one
    set: str = TUNED  # the folder of its curve: study, tuning or pilot

    @property
    def label(self) -> str:
        """The arm with its critic, unless that is the good one, and with its setting."""
        return ".".join([self.arm, *([self.critic] if self.critic != GOOD else []), *filter(None, [self.setting])])

    @property
    def name(self) -> str:
        return f"{self.label}--{self.task}--{self.size}--{self.seed}"


@dataclass(frozen=True, slots=True)
class Job:
    """A command of ``sae-rl`` that leaves ``made``."""

    name: str
    made: Path
    needs: tuple[str, ...] = ()  # jobs without which it cannot run
    follows: tuple[str, ...] = ()  # jobs that must have ended, however they did
    run: Run | None = None  # None: a base model or a critic
    command: tuple[str, ...] = ()  # empty for a run: `Matrix.train` has that


class Matrix:
    """``matrix.yaml``. Raises ValueError for a name that it does not define."""

    def __init__(self, tree: Mapping[str, Any]) -> None:
        self._tree = tree
        self.folder, self.curves = Path(tree["folder"]), Path(tree["curves"])
        self.arms, self.tasks, self.sizes = tree["arms"], tree["tasks"], tree["sizes"]
        self.fidelity = tree.get("fidelity", {})
        self.critics, self.stages, self.tuning = tree["critics"], tree["stages"], tree[TUNING]
        for stage in self.stages.values():
            for key in ("arms", "tasks", "sizes", "critics"):
                known = getattr(self, key)
                if unknown := sorted(set(stage[key]) - set(known)):
                    raise ValueError(f"matrix.yaml: {key} = {unknown}, allowed: {', '.join(known)}")

    @classmethod
    def read(cls, file: Path = FILE) -> Matrix:
        return cls(yaml.safe_load(file.read_text()))

    def runs(self, stage: str) -> Iterator[Run]:
        """The runs of a stage in their order: what tunes its arms first, then seed after seed of all arms.

        Raises:
            ValueError: there is no such stage.
        """
        if stage not in self.stages:
            raise ValueError(f"there is no stage {stage!r}, allowed: {', '.join(self.stages)}")
        found = self.stages[stage]
        axes = product(found["seeds"], found["tasks"], found["sizes"], found["critics"], found["arms"])
        runs = [Run(arm, task, size, seed, critic, set=found["set"]) for seed, task, size, critic, arm in axes]
        yield from dict.fromkeys(tried for run in runs for tried in self.tuned_by(run))
        yield from runs

    def tuned_by(self, run: Run) -> list[Run]:
        """The runs among which tuning chooses the setting of a run; empty if its stage is not tuned."""
        if run.set != TUNED:
            return []
        size, seed, settings = (self.tuning[key] for key in ("size", "seed", "settings"))
        return [Run(run.arm, run.task, size, seed, setting=setting, set=TUNING) for setting in settings]

    def jobs(self, stages: Sequence[str]) -> list[Job]:
        """The jobs of these stages in their order, once each; base models and critics before the runs that need them."""
        found: dict[str, Job] = {}
        for run in (run for stage in stages for run in self.runs(stage)):
            needs = [self._base(run.task, run.size, run.seed, found)]
            if self.has_critic(run.arm):
                needs.append(self._critic(run, found))
            follows = [self.job_name(tried) for tried in self.tuned_by(run)]
            name = self.job_name(run)
            found.setdefault(name, Job(name, self.output(run) / "policy", tuple(needs), tuple(follows), run))
        return list(found.values())

    def job_name(self, run: Run) -> str:
        return f"{run.set}/{run.name}"

    def output(self, run: Run) -> Path:
        """``output_dir`` of a run."""
        return self.folder / run.set / run.name

    def curve(self, run: Run) -> Path:
        """The curve of a run. Its folder holds the runs that can be compared with each other."""
        return self.curves / run.set / f"{run.task}-{run.size}" / f"{run.label}--{run.seed}.csv"

    def has_critic(self, arm: str) -> bool:
        return bool(self.arms[arm].get("critic", True))

    def base(self, task: str, size: str, seed: int) -> Path:
        return self.folder / "base" / f"{task}--{size}--{seed}"

    def critic(self, run: Run) -> Path:
        """``output_dir`` of the pre-training of a run's critic; the critic itself is in its folder ``critic``."""
        return self.folder / "critic" / f"{run.critic}--{run.task}--{run.size}--{run.seed}"

    def _base(self, task: str, size: str, seed: int, found: dict[str, Job]) -> str:
        folder = self.base(task, size, seed)
        keys = [*self.tasks[task]["warm_start"], *self.sizes[size]["warm_start"]]
        command = ("warm-start", f"output_dir={folder}", f"training.seed={seed}", *keys)
        found.setdefault(str(folder), Job(str(folder), folder, command=command))
        return str(folder)

    def _critic(self, run: Run, found: dict[str, Job]) -> str:
        kind, folder = self.critics[run.critic], self.critic(run)
        needs, own = [str(self.base(run.task, run.size, run.seed))], []
        if kind["size"] is not None:
            needs.append(self._base(run.task, kind["size"], run.seed, found))
            own = [f"learner.critic.model.path={needs[-1]}"]
        command = ("pretrain-critic", *self._common(run, folder), *own, *kind["pretrain_critic"][run.task])
        found.setdefault(str(folder), Job(str(folder), folder / "critic", tuple(needs), command=command))
        return str(folder)

    def _common(self, run: Run, output: Path) -> list[str]:
        """The overrides that all arms share."""
        paths = [f"output_dir={output}", f"model.path={self.base(run.task, run.size, run.seed)}", f"seed={run.seed}"]
        return [*self._tree["train"], *self.tasks[run.task]["train"], *paths]

    def train(self, run: Run, setting: str | None = None) -> tuple[str, ...]:
        """The command of a run.

        Args:
            setting: what tuning chose. None: the run's own, or that of ``conf/``.
        """
        arm, setting = self.arms[run.arm], setting or run.setting
        own = [*arm.get("train", ()), *arm.get("by_task", {}).get(run.task, ())]
        own += self.tuning["settings"][setting] if setting else ()
        if self.has_critic(run.arm):
            own.append(f"learner.critic_pretraining.checkpoint={self.critic(run) / 'critic'}")
        replaced = {key_of(override) for override in own}  # Hydra refuses a key that is given twice
        common = self._common(run, self.output(run))
        return ("train", *(override for override in common if key_of(override) not in replaced), *own)


def key_of(override: str) -> str:
    return override.partition("=")[0]
