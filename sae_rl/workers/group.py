"""The Ray actors of one role, called together. A dead or late worker becomes one readable error on the driver."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from sae_rl.config.schema import Config
from sae_rl.workers.placement import Slot

LOG_LINES = 15
NOTE_S, LOGGED_NOTE_S = 15.0, 60.0  # between two lines about a wait, on a terminal and in a log
KILL_S = 30.0  # the longest wait for a node to kill processes; the node itself may be gone


class WorkerError(RuntimeError):
    """A worker died, failed or did not answer. The message names its role and rank and ends with its last log lines.

    Args:
        died: the role of a worker whose process is gone or does not answer; None: the process answered.
    """

    def __init__(self, message: str, *, died: str | None = None) -> None:
        super().__init__(message)
        self.died = died


@dataclass(frozen=True, slots=True)
class Place:
    """Where a worker's process runs."""

    pid: int
    host: str
    log: str
    node: str  # Ray's id of the node
    # (pid, creation time) of the process and its children; a pid alone may be used again
    processes: tuple[tuple[int, float], ...]


class Process:
    """A worker's process: what each role says about itself, and what every process can tell about its place.

    A subclass has a method ``start``. The driver calls it with `settings`; a learner gets its `Rank` first.
    """

    @staticmethod
    def is_needed(config: Config) -> bool:
        """Whether a training run with this configuration starts the role."""
        raise NotImplementedError

    @staticmethod
    def settings(config: Config) -> tuple[object, ...]:
        """The arguments of ``start``. User classes stay out: a worker's node may not be able to import them."""
        raise NotImplementedError

    def whereabouts(self) -> Place:
        here = psutil.Process()
        family = tuple((process.pid, process.create_time()) for process in (here, *here.children(recursive=True)))
        node = ray.get_runtime_context().get_node_id()
        return Place(here.pid, socket.gethostname(), os.readlink("/proc/self/fd/2"), node, family)

    def free_address(self) -> tuple[str, int]:
        """This node's address and a port that is free now."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), int(probe.getsockname()[1])


@dataclass(frozen=True, slots=True)
class Call:
    """A pending remote call on ranks of a group."""

    group: WorkerGroup
    references: dict[int, Any]  # by rank


START_OR_CALL = "cluster.call_timeout_s, or cluster.start_timeout_s at the start"


def wait_for(
    calls: Sequence[Call],
    timeout_s: float,
    *,
    doing: str = "answer",
    key: str = START_OR_CALL,
    note: Callable[[str], None] | None = None,
) -> list[list[Any]]:
    """Waits for remote calls. Returns their results by call and rank.

    Args:
        doing, key: what the calls do and the key of their time limit, for the message of a late rank.
        note: prints a line now and then that says which ranks are waited for; None: nothing is printed.

    Raises:
        WorkerError: a rank failed or died, or did not answer in time; raised as soon as that is known.
    """
    owners = {reference: (call.group, rank) for call in calls for rank, reference in call.references.items()}
    results: dict[Any, Any] = {}
    pending = list(owners)
    started, every_s = time.monotonic(), NOTE_S if sys.stdout.isatty() else LOGGED_NOTE_S
    next_s = every_s if note else timeout_s
    while pending:
        left_s = started + min(next_s, timeout_s) - time.monotonic()
        done, pending = ray.wait(pending, num_returns=1, timeout=max(0.0, left_s))
        if not done and next_s < timeout_s and note:
            note(f"waiting for {_names(owners, pending)} to {doing}: {next_s:.0f} s")
            next_s += every_s
            continue
        if not done:
            raise _late(owners, pending, f"{doing} within {timeout_s:g} s ({key})")
        group, rank = owners[done[0]]
        results[done[0]] = group.result(rank, done[0])
    return [[results[reference] for reference in call.references.values()] for call in calls]


def _names(owners: dict[Any, tuple[WorkerGroup, int]], pending: list[Any]) -> str:
    return ", ".join(f"{owners[reference][0].role} {owners[reference][1]}" for reference in pending)


def _late(owners: dict[Any, tuple[WorkerGroup, int]], pending: list[Any], what: str) -> WorkerError:
    group, rank = owners[pending[0]]
    return WorkerError(f"worker(s) {_names(owners, pending)} did not {what}{group.last_lines(rank)}", died=group.role)


class WorkerGroup:
    """Ranks 0 .. n-1 of one role."""

    def __init__(self, role: str, starts: Sequence[Callable[[], ActorHandle]], timeout_s: float) -> None:
        self.role = role
        self.timeout_s = timeout_s
        self._starts = starts
        self.workers = [start() for start in starts]
        self.places: list[Place | None] = [None] * len(starts)  # None: unknown yet

    def locate(
        self, timeout_s: float, ranks: Sequence[int] | None = None, note: Callable[[str], None] | None = None
    ) -> list[Place]:
        """Waits until the processes of these ranks (None: all) run, and remembers where. ``note`` as in `wait_for`."""
        call = self.start(lambda worker: worker.whereabouts.remote(), ranks)
        found: list[Place] = wait_for([call], timeout_s, doing="start its process", note=note)[0]
        for rank, place in zip(call.references, found, strict=True):
            self.places[rank] = place
        return found

    def replace(self, rank: int) -> ActorHandle:
        """Kills a worker and starts a new one in its slot."""
        ray.kill(self.workers[rank])
        self.places[rank] = None
        self.workers[rank] = self._starts[rank]()
        return self.workers[rank]

    def start(self, call: Callable[[ActorHandle], Any], ranks: Sequence[int] | None = None) -> Call:
        """Starts a remote call on these ranks (None: all) without waiting for it."""
        ranks = range(len(self.workers)) if ranks is None else ranks
        return Call(self, {rank: call(self.workers[rank]) for rank in ranks})

    def run(self, call: Callable[[ActorHandle], Any], ranks: Sequence[int] | None = None) -> list[Any]:
        """Makes a remote call on these ranks (None: all). Returns results in their order. Raises `WorkerError`."""
        return wait_for([self.start(call, ranks)], self.timeout_s)[0]

    def result(self, rank: int, reference: Any) -> Any:
        try:
            return ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, BaseException) else error
            raise WorkerError(
                f"{self.role} worker {rank} failed: {type(cause).__name__}: {cause}{_advice(self.role, str(cause))}"
            ) from error
        except ray.exceptions.RayActorError as error:
            raise WorkerError(
                f"{self.role} worker {rank} died{_advice(self.role, str(error))}{self.last_lines(rank)}", died=self.role
            ) from error

    def last_lines(self, rank: int) -> str:
        place = self.places[rank]
        if place is None:
            return ""
        where = f" (process {place.pid} on {place.host}, log {place.log})"
        if not Path(place.log).is_file():
            return where
        lines = Path(place.log).read_text(errors="replace").splitlines()[-LOG_LINES:]
        return f"{where}; its last lines:\n  " + "\n  ".join(lines)

    def close(self) -> None:
        for worker in self.workers:
            ray.kill(worker)


def kill_processes(place: Place) -> None:
    """Kills a worker and its children on their node; also stopped children, which would outlive it."""
    if place.node == ray.get_runtime_context().get_node_id():
        _kill(place.processes)
        return
    there = NodeAffinitySchedulingStrategy(node_id=place.node, soft=False)
    ray.wait([ray.remote(_kill).options(num_cpus=0, scheduling_strategy=there).remote(place.processes)], timeout=KILL_S)


def _kill(processes: Sequence[tuple[int, float]]) -> None:
    for pid, created in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            if process.create_time() == created:
                process.kill()


def _advice(role: str, text: str) -> str:
    """Advice where memory of a GPU or a host ran out, also if Ray's memory monitor killed the worker."""
    if not re.search(r"(?i:out of memory|can't allocate memory|memory pressure|low on memory)|\bOOM\b", text):
        return ""
    if role == "rollout":
        return "\nMemory ran out: lower rollout.kv_cache_gb or rollout.gpu_memory_utilization"
    name = "critic" if role == "critic" else "policy"
    return (
        f"\nMemory ran out: lower learner.{name}.micro_batch_tokens, set learner.{name}.activation_checkpointing=true, "
        f"raise learner.{name}.zero_stage, or offload (learner.{name}.offload_optimizer)"
    )


def start_worker(cls: type[Process], slot: Slot, group: PlacementGroup, env: dict[str, str]) -> ActorHandle:
    """Starts one worker in its slot. Ray runs many calls at once if the class has coroutines, and otherwise one by one."""
    actor: ActorHandle = (
        ray.remote(cls)
        .options(  # type: ignore[attr-defined]
            num_cpus=slot.cpus,
            num_gpus=slot.gpus,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                placement_group=group, placement_group_bundle_index=slot.bundle
            ),
            runtime_env={"env_vars": env},
        )
        .remote()
    )
    return actor
