"""Ray and a run's workers: connected, checked, placed, started, and ended with the run."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
from collections.abc import Callable, Iterator

import psutil
import ray
from ray.util.placement_group import PlacementGroup, remove_placement_group

from sae_rl.config.schema import Config
from sae_rl.records.clock import Clock
from sae_rl.settings import ConfigError
from sae_rl.types import Prompt
from sae_rl.workers.critic import CriticWorker
from sae_rl.workers.group import Process, WorkerGroup, start_worker
from sae_rl.workers.placement import Placement, Role, check_resources, plan, reserve, roles_of
from sae_rl.workers.policy import PolicyWorker
from sae_rl.workers.reference import ReferenceWorker
from sae_rl.workers.rollout import RolloutWorker
from sae_rl.workers.rollout_pool import RolloutPool
from sae_rl.workers.run_workers import RunWorkers

WORKERS: dict[Role, type[Process]] = {
    "rollout": RolloutWorker,
    "policy": PolicyWorker,
    "critic": CriticWorker,
    "reference": ReferenceWorker,
}
CLOSE_TIMEOUT_S = 4.0


@contextlib.contextmanager
def ray_session(config: Config) -> Iterator[None]:
    """Starts a Ray of its own, or joins ``cluster.address``; leaves it as it was found."""
    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    options = {"log_to_driver": False, "configure_logging": False}
    terminate = signal.getsignal(signal.SIGTERM)
    try:
        if address is None:
            # "local": without it Ray joins whatever cluster it finds running on this machine.
            ray.init(address="local", num_cpus=os.cpu_count(), include_dashboard=False, **options)
        else:
            ray.init(address=address, **options)
    except ConnectionError as error:
        raise ConfigError([f"cluster.address = {address!r}: no Ray cluster answers there ({error})"]) from error
    signal.signal(signal.SIGTERM, terminate)  # Ray's own would end Ray before the workers are closed
    try:
        yield
    finally:
        ours = [child for child in psutil.Process().children(recursive=True) if child.name().startswith("ray::")]
        ray.shutdown()
        for child in ours:  # Ray's agents would take a minute to notice that their raylet is gone
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()


@contextlib.contextmanager
def start_workers(
    config: Config,
    probe_prompts: list[Prompt],
    clock: Clock,
    roles: list[Role] | None = None,
    note: Callable[[str], None] = print,
) -> Iterator[RunWorkers]:
    """Places and starts every worker, or those of ``roles``; kills them all at the end, however it comes.

    ``note`` tells the reader of the console what happened to them.

    Raises:
        ConfigError: Ray does not have what the run asks for.
        TimeoutError: it has, but others hold it.
        WorkerError: a worker failed to start.
    """
    with _placed(config, roles_of(config) if roles is None else roles) as groups:
        workers = RunWorkers(config, groups, probe_prompts, clock, note)
        workers.start()
        yield workers


@contextlib.contextmanager
def start_rollout(config: Config, clock: Clock) -> Iterator[RolloutPool]:
    """Only the rollout engines, with the weights of ``model.path``."""
    with _placed(config, ["rollout"]) as groups:
        workers = RunWorkers(config, groups, [], clock)
        workers.start()
        yield workers.rollout


@contextlib.contextmanager
def _placed(config: Config, roles: list[Role]) -> Iterator[dict[Role, WorkerGroup]]:
    placement = plan(config, roles)
    try:
        check_resources(placement, [node["Resources"] for node in ray.nodes() if node["Alive"]])
    except ValueError as error:
        raise ConfigError([str(error)]) from error
    reserved = reserve(placement, config.cluster.start_timeout_s)
    groups: dict[Role, WorkerGroup] = {}
    try:
        groups = _spawn(config, placement, reserved)
        yield groups
    finally:
        close(groups)
        remove_placement_group(reserved)


def _spawn(config: Config, placement: Placement, group: PlacementGroup) -> dict[Role, WorkerGroup]:
    groups: dict[Role, WorkerGroup] = {}
    for role, slots in placement.slots.items():
        threads = getattr(config.cluster, role).threads_per_worker
        env = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        if config.cluster.device == "cpu" and role != "rollout":
            env["DS_ACCELERATOR"] = "cpu"
        starts = [functools.partial(start_worker, WORKERS[role], slot, group, env) for slot in slots]
        groups[role] = WorkerGroup(role, starts, config.cluster.call_timeout_s)
    return groups


def close(groups: dict[Role, WorkerGroup]) -> None:
    """Asks the engines to end their child processes, then kills every worker."""
    if "rollout" in groups:
        closing = [worker.close.remote() for worker in groups["rollout"].workers]
        ray.wait(closing, num_returns=len(closing), timeout=CLOSE_TIMEOUT_S)
    for group in groups.values():
        group.close()
