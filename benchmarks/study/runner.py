"""Runs the jobs of the matrix: in order, some side by side, and again after any kill from where they were.

A run is finished when its record says so, which is committed with its curve: a checkout repeats no committed run. A base
model or a critic is finished when it is there, and is made only if a run that is left needs it.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from benchmarks.study import curves
from benchmarks.study.matrix import Job, Matrix, Run
from sae_rl.cli import INTERRUPTED

SAE_RL = (sys.executable, "-m", "sae_rl")
ATTEMPTS = 2  # of a job that ends with an error; then it counts as failed
FINISHED, FAILED, LEFT, BLOCKED = "finished", "failed", "left", "blocked"
CLOSING_S = 60.0  # for a run to close its processes after SIGTERM
POLL_S = 0.2


@dataclass
class Runner:
    """Runs jobs of a matrix. ``program`` is the command in front of the words of a job."""

    matrix: Matrix
    jobs: Sequence[Job]
    program: Sequence[str] = SAE_RL
    # With the size of the log when the process began.
    _running: dict[str, tuple[Job, subprocess.Popen[bytes], int]] = field(default_factory=dict)

    def run(self, num_side_by_side: int = 1, minutes: float | None = None) -> None:
        """Runs what is left. After ``minutes`` it starts nothing more, and waits for what is running.

        Raises:
            RuntimeError: another runner works in the folder, or a run that a killed one left.
            ValueError: a job was started by another command than the matrix has now, or from another base model or critic
                than other runs of its seed.
        """
        self._refuse_stale()
        until = None if minutes is None else time.monotonic() + 60 * minutes
        with self._lock() as lock:
            try:
                while True:
                    self._settle()
                    while len(self._running) < num_side_by_side and (until is None or time.monotonic() < until):
                        if (job := self._next()) is None:
                            break
                        self._start(job, lock)
                    if not self._running:
                        return
                    time.sleep(POLL_S)
            finally:
                self._stop()

    def states(self) -> dict[str, str]:
        """By job: finished, failed, left to do, or blocked by a base model or a critic that failed."""
        found: dict[str, str] = {}
        for job in self.jobs:  # what a job needs stands before it
            record = curves.read_record(self.record_file(job))
            if record.get("state") == FINISHED if job.run else job.made.exists():
                found[job.name] = FINISHED
            elif record.get("state") == FAILED:
                found[job.name] = FAILED
            else:
                lacking = any(found[name] in (FAILED, BLOCKED) for name in job.needs)
                found[job.name] = BLOCKED if lacking else LEFT
        return found

    def record_file(self, job: Job) -> Path:
        """Where it is written how a job ended: of a run beside its curve, which is committed."""
        return self.matrix.curve(job.run).with_suffix(".json") if job.run else Path(f"{job.name}.json")

    def command(self, job: Job) -> tuple[str, ...]:
        """The words of a job's command. Those of a run have the setting that tuning chose, if its stage is tuned."""
        return job.command if job.run is None else self.matrix.train(job.run, self.chosen(job.run))

    def chosen(self, run: Run) -> str | None:
        """The setting with the largest primary outcome in tuning, the first of those that are equal; None: not tuned."""
        if not (tried := self.matrix.tuned_by(run)):
            return None
        return max(tried, key=lambda one: curves.area(self.matrix.curve(one))).setting

    def _next(self) -> Job | None:
        """The first job that is left, does not run yet and needs nothing that is left: a run, or what one needs."""
        states = self.states()
        wanted: set[str] = set()
        for job in reversed(self.jobs):  # what a job needs stands before it
            if states[job.name] == LEFT and (job.run or job.name in wanted):
                wanted |= {job.name, *job.needs}
        for job in self.jobs:
            is_ready = all(states[name] != LEFT for name in (*job.needs, *job.follows))
            if states[job.name] == LEFT and job.name in wanted - self._running.keys() and is_ready:
                return job
        return None

    def _start(self, job: Job, lock: IO[str]) -> None:
        if job.made.exists():  # a runner was killed between the end of the job and its record
            return self._finish(job)
        self._refuse_other_models(job)
        self._write(job)  # a run that is stopped has its command and its digests too
        log = self._log(job)
        log.parent.mkdir(parents=True, exist_ok=True)
        began = log.stat().st_size if log.exists() else 0
        with log.open("ab") as output:
            process = subprocess.Popen(
                [*self.program, *self.command(job)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,  # Ctrl-C reaches this process alone, which then ends its runs
                pass_fds=[lock.fileno()],  # the lock is held as long as the run lives
            )
        print(f"{job.name}: started, log in {log}", flush=True)
        self._running[job.name] = (job, process, began)

    def _settle(self) -> None:
        """Writes down how processes ended."""
        for name, (job, process, began) in list(self._running.items()):
            if process.poll() is None:
                continue
            del self._running[name]
            if job.made.exists():
                self._finish(job)
            elif process.returncode != INTERRUPTED:  # someone stopped this run, which says nothing about it
                self._fail(job, began)

    def _finish(self, job: Job) -> None:
        self._write(job, state=FINISHED)
        print(f"{job.name}: finished", flush=True)

    def _fail(self, job: Job, began: int) -> None:
        attempts = curves.read_record(self.record_file(job)).get("attempts", 0) + 1
        output = self._log(job).read_bytes()[began:].decode(errors="replace")
        lines = [line for line in output.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error:")] or lines or ["no output"]
        self._write(job, state=FAILED if attempts >= ATTEMPTS else LEFT, attempts=attempts, message=errors[-1])
        print(f"{job.name}: failed, attempt {attempts} of {ATTEMPTS}: {errors[-1]}", flush=True)

    def _write(self, job: Job, **ended: Any) -> None:
        """Adds to a job's record. The digests are those of its first start."""
        before = curves.read_record(self.record_file(job))
        record = {**self._models(job), **before, **ended, "command": list(self.command(job))}
        if job.run is not None and ended:
            folder = self.matrix.output(job.run)
            if ended["state"] != LEFT:
                curves.write_curve(folder, self.matrix.curve(job.run), job.run.label)
            card = curves.read_record(self.matrix.critic(job.run) / "critic" / "critic.json")
            record |= {
                "config_sha256": curves.digest(folder / "config.yaml"),
                "commit": curves.source(),
                "critic_explained_variance": card.get("explained_variance")
                if self.matrix.has_critic(job.run.arm)
                else None,
            }
        curves.write_record(self.record_file(job), record)

    def _models(self, job: Job) -> dict[str, Any]:
        """Which run a job is, and the digests of the base model and the critic that it begins from; empty: it is no run."""
        if (run := job.run) is None:
            return {}
        critic = self.matrix.critic(run) / "critic" if self.matrix.has_critic(run.arm) else None
        return asdict(run) | {
            "base_sha256": curves.weights_digest(self.matrix.base(run.task, run.size, run.seed)),
            "critic_sha256": critic and curves.weights_digest(critic),
        }

    def _refuse_other_models(self, job: Job) -> None:
        """Runs of one task, size and seed pair only if they begin from the same base model, and from the same critic."""
        if (run := job.run) is None:
            return
        own = self._models(job)
        for file in sorted(self.matrix.curves.glob(f"*/{run.task}-{run.size}/*--{run.seed}.json")):
            other = curves.read_record(file)
            same = ["base_sha256", *(["critic_sha256"] if other["critic"] == run.critic else [])]
            if differ := [key for key in same if None not in (own[key], other[key]) and own[key] != other[key]]:
                raise ValueError(
                    f"{job.name} would begin from another model than {file}: {' and '.join(differ)} differ; bring back the "
                    "model that was there, or remove the files of all runs of this task, size and seed"
                )

    def _log(self, job: Job) -> Path:
        return self.matrix.folder / "logs" / f"{'--'.join(Path(job.name).parts[-2:])}.log"

    def _refuse_stale(self) -> None:
        for job in self.jobs:
            record = curves.read_record(self.record_file(job))
            if record and record["command"] != list(self.command(job)):
                differ = sorted({*record["command"]} ^ {*self.command(job)})
                raise ValueError(
                    f"{self.record_file(job)} was made by another command: {' '.join(differ)} differ; undo the change of the "
                    "matrix, or remove the job's files"
                )

    @contextmanager
    def _lock(self) -> Iterator[IO[str]]:
        self.matrix.folder.mkdir(parents=True, exist_ok=True)
        with (self.matrix.folder / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                found = f"{self.matrix.folder}: another study, or a run that a killed one left, is at work there"
                raise RuntimeError(f"{found}; wait until it ends") from error
            yield lock

    def _stop(self) -> None:
        """Ends what runs, as Ctrl-C does: the same command continues from the last checkpoint."""
        for _, process, _ in self._running.values():
            process.terminate()
        for _, process, _ in self._running.values():
            try:
                process.wait(CLOSING_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
        self._running.clear()
