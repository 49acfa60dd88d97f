"""The records of a run: metrics as JSONL and in TensorBoard and wandb, responses as parquet, and the console.

Training never reads records. A resumed run drops the records of the steps that it repeats, so every step is recorded
once. A new run drops all records in its folder.
"""

from __future__ import annotations

import json
import math
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

from torch import Tensor

from sae_rl.config.schema import Config, as_tree
from sae_rl.records.metrics import Phase, check_names
from sae_rl.records.rollouts import FOLDER as ROLLOUTS
from sae_rl.records.rollouts import step_files, write_rollouts
from sae_rl.records.samples import FOLDER as SAMPLES
from sae_rl.records.samples import write_samples
from sae_rl.records.terminal import Terminal
from sae_rl.rewards.pool import Rewards
from sae_rl.types import Rollout, StepRecord
from sae_rl.whole_files import whole_file

if TYPE_CHECKING:
    import wandb
    from torch.utils.tensorboard import SummaryWriter


def first_steps(first_step: int, resumed: bool) -> dict[Phase, float]:
    """The first step that this process writes, by phase; records of earlier steps are kept."""
    if not resumed:
        return {"train": 0, "evaluation": 0, "pretraining": 0}
    # The evaluation of step s samples the policy after s steps, so it was done before the checkpoint of step s. The
    # steps of pre-training are epochs, all of which were done before.
    return {"train": first_step, "evaluation": first_step + 1, "pretraining": math.inf}


class Records:
    """Records a run from ``first_step`` on: the step that a resumed run continues with, or 0.

    ``resumed`` matters only at step 0, whose checkpoint follows the critic's pre-training.

    with Records(config, run_dir, first_step=0) as records:
        records.note("training starts")
        records.log(0, {"rollout/reward_mean": 0.2})
    """

    def __init__(self, config: Config, run_dir: Path, first_step: int, *, resumed: bool = False) -> None:
        self._config, self._run_dir = config, run_dir
        starts = first_steps(first_step, resumed or first_step > 0)
        run_dir.mkdir(parents=True, exist_ok=True)
        repeated = [file for step, file in step_files(run_dir / ROLLOUTS) if step >= starts["train"]]
        repeated += [file for step, file in step_files(run_dir / SAMPLES) if step >= starts["evaluation"]]
        for file in repeated:
            file.unlink()
        self._terminal = Terminal(config, first_step)
        with ExitStack() as stack:  # closes the sinks that were opened before one that fails
            self._sinks = [stack.enter_context(closing(sink)) for sink in self._open(starts)]
            self._stack = stack.pop_all()

    def _open(self, starts: Mapping[Phase, float]) -> Iterator[Terminal | Jsonl | TensorBoard | Wandb]:
        yield self._terminal
        logger = self._config.logger
        if logger.jsonl:
            yield Jsonl(self._run_dir / "metrics.jsonl", starts)
        if logger.tensorboard:
            yield TensorBoard(self._run_dir / "tensorboard", starts)
        if logger.wandb.mode not in ("off", "disabled"):
            yield Wandb(self._config, self._run_dir, self.note)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def log(self, step: int, metrics: Mapping[str, float], phase: Phase = "train") -> None:
        """Writes metrics to every sink. Their names must be in `sae_rl.records.metrics.METRICS`."""
        assert phase in get_args(Phase), phase
        check_names(metrics)
        for sink in self._sinks:
            sink.log(step, metrics, phase)

    def note(self, text: str) -> None:
        """Prints a message on the console."""
        self._terminal.note(text)

    def rollouts(self, record: StepRecord) -> None:
        """Writes a parquet file with a row per response, every ``logger.rollouts_every_steps`` and at the last step."""
        every = self._config.logger.rollouts_every_steps
        if every and (record.step % every == 0 or record.step == self._config.steps - 1):
            write_rollouts(self._run_dir, record)

    def samples(self, step: int, rollouts: Sequence[Rollout], rewards: Rewards, opens: Sequence[Tensor] | None) -> None:
        """Writes a parquet file with a row per response of an evaluation, if ``evaluation.record_samples``."""
        if self._config.evaluation.record_samples:
            write_samples(self._run_dir / SAMPLES / f"step_{step:06d}.parquet", rollouts, rewards, opens)


class Jsonl:
    """One line per call: ``{"step": 3, "phase": "train", "time": 1763820000.0, "rollout/reward_mean": 0.2, ...}``."""

    def __init__(self, path: Path, starts: Mapping[Phase, float]) -> None:
        rows = read_jsonl(path) if path.exists() else []
        kept = [row for row in rows if row["step"] < starts[row["phase"]]]
        with whole_file(path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self._file = path.open("a")

    def log(self, step: int, metrics: Mapping[str, float], phase: Phase) -> None:
        numbers = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        row = {"step": step, "phase": phase, "time": round(time.time(), 3), **numbers}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a file. Raises ValueError for a line that is no JSON, but ignores an incomplete last line."""
    lines = path.read_text().split("\n")
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            if number < len(lines):  # the last one has no newline behind it: the process that wrote it was killed
                raise ValueError(f"{path}, line {number} is no JSON ({error}); remove that line") from error
    return rows


class TensorBoard:
    """Event files. Evaluation and pre-training have their own folders, since they count steps differently."""

    def __init__(self, folder: Path, starts: Mapping[Phase, float]) -> None:
        self._starts = starts
        self._folders = {"train": folder, "evaluation": folder / "evaluation", "pretraining": folder / "pretraining"}
        for phase, start in starts.items():
            for file in self._folders[phase].glob("events.out.tfevents.*") if start == 0 else ():
                file.unlink()
        self._writers: dict[Phase, SummaryWriter] = {}

    def log(self, step: int, metrics: Mapping[str, float], phase: Phase) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if phase not in self._writers:
            start = self._starts[phase]  # TensorBoard hides the steps from here on that a killed run wrote
            purge_step = int(start) if 0 < start < math.inf else None
            self._writers[phase] = SummaryWriter(str(self._folders[phase]), purge_step=purge_step)
        for name, value in metrics.items():
            self._writers[phase].add_scalar(name, value, step)
        self._writers[phase].flush()

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()


class Wandb:
    """One wandb run for each run folder, resumed by the id stored there. Failures of wandb never end a run."""

    def __init__(self, config: Config, run_dir: Path, warn: Callable[[str], None]) -> None:
        import wandb
        from wandb.sdk.lib.service.service_connection import WandbApiFailedError
        from wandb.sdk.mailbox.mailbox import MailboxClosedError

        # wandb's own exceptions, and those of the socket when wandb's process has died
        self._errors = (wandb.Error, WandbApiFailedError, MailboxClosedError, ConnectionError, TimeoutError)
        self._warn = warn
        self._run: wandb.Run | None = None
        id_file = run_dir / "wandb_id"
        if not id_file.exists():
            id_file.write_text(os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:8])
        chosen = config.logger.wandb
        with self._off_after_a_failure():
            self._run = wandb.init(
                # wandb takes an argument that is None from its environment variable.
                project=chosen.project or os.environ.get("WANDB_PROJECT") or "sae-rl",
                name=chosen.name or os.environ.get("WANDB_NAME") or config.name,
                group=chosen.group,
                tags=chosen.tags,
                notes=chosen.notes,
                entity=chosen.entity,
                id=id_file.read_text().strip(),
                resume="allow",
                dir=None if os.environ.get("WANDB_DIR") else str(run_dir),
                mode=_wandb_mode(chosen.mode),
                config=as_tree(config),
                settings=wandb.Settings(console="off", silent=True),
            )
            # wandb's own step cannot decrease, as it would on resuming and after pre-training
            self._run.define_metric("*", step_metric="step")
            self._run.define_metric("pretraining/*", step_metric="pretraining/epoch")

    def log(self, step: int, metrics: Mapping[str, float], phase: Phase) -> None:
        axis = {"pretraining/epoch" if phase == "pretraining" else "step": step}
        with self._off_after_a_failure():
            if self._run is not None:
                self._run.log({**metrics, **axis})

    def close(self) -> None:
        with self._off_after_a_failure():
            if self._run is not None:
                self._run.finish()

    @contextmanager
    def _off_after_a_failure(self) -> Iterator[None]:
        try:
            yield
        except self._errors as error:
            self._run = None
            self._warn(f"wandb failed and is off from here on; the run goes on: {type(error).__name__}: {error}")


def _wandb_mode(choice: str) -> Literal["online", "offline"] | None:
    """wandb's mode: online if wandb finds an API key. None leaves the choice to the environment variable WANDB_MODE."""
    from wandb.sdk.lib.wbauth.wbnetrc import read_netrc_auth

    if choice != "auto":
        return "online" if choice == "online" else "offline"
    if os.environ.get("WANDB_MODE"):
        return None
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    return "online" if os.environ.get("WANDB_API_KEY") or read_netrc_auth(host=host) else "offline"
