"""Connects to Ray, and starts and ends a run's workers."""

from __future__ import annotations

import contextlib
import functools
import logging
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
from sae_rl.workers.group import WorkerGroup, start_worker
from sae_rl.workers.placement import Placement, check_resources, nodes_of_bundles, order_ranks, plan, reserve
from sae_rl.workers.run_workers import RunWorkers
from sae_rl.workers.table import WORKERS, roles_of

CLOSE_TIMEOUT_S = 4.0
# It says at every start that a local Ray asks its own processes for a token, as Ray does unless it is told otherwise.
logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)


@contextlib.contextmanager
def ray_session(config: Config) -> Iterator[None]:
    """Joins the Ray cluster at ``cluster.address``, or starts a local one and ends it afterwards."""
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
    signal.signal(signal.SIGTERM, terminate)  # Ray's handler would end Ray before the workers are closed
    try:
        yield
    finally:
        ours = [child for child in psutil.Process().children(recursive=True) if child.name().startswith("ray::")]
        ray.shutdown()
        for child in ours:  # Ray's agents need a minute to notice that their raylet is gone
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()


@contextlib.contextmanager
def start_workers(
    config: Config,
    probe_prompts: list[Prompt],
    clock: Clock,
    roles: list[str] | None = None,
    note: Callable[[str], None] = print,
) -> Iterator[RunWorkers]:
    """Places and starts the workers of ``roles`` (None: of every role that a training run needs); kills them at the end.

    Args:
        probe_prompts: prompts that a weight sync is checked with; none are needed without policy workers.
        note: prints a line for the user, such as that an engine was replaced.

    Raises:
        ConfigError: Ray does not have the resources that the run needs.
        TimeoutError: Ray has them, but other jobs hold them.
        WorkerError: a worker failed to start.
    """
    placement = plan(config, roles_of(config) if roles is None else roles)
    try:
        check_resources(placement, [node["Resources"] for node in ray.nodes() if node["Alive"]])
    except ValueError as error:
        raise ConfigError([str(error)]) from error
    reserved = reserve(placement, config.cluster.start_timeout_s, note)
    groups: dict[str, WorkerGroup] = {}
    try:
        placement = order_ranks(placement, nodes_of_bundles(reserved), config.learner.sequence_parallel_size)
        groups = _spawn(config, placement, reserved)
        workers = RunWorkers(config, groups, probe_prompts, clock, note)
        workers.start()
        yield workers
    finally:
        _close(groups)
        remove_placement_group(reserved)


def _spawn(config: Config, placement: Placement, group: PlacementGroup) -> dict[str, WorkerGroup]:
    groups: dict[str, WorkerGroup] = {}
    for role, slots in placement.slots.items():
        threads = getattr(config.cluster, role).threads_per_worker
        env = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        if config.cluster.device == "cpu" and role != "rollout":
            env["DS_ACCELERATOR"] = "cpu"
        starts = [functools.partial(start_worker, WORKERS[role], slot, group, env) for slot in slots]
        groups[role] = WorkerGroup(role, starts, config.cluster.call_timeout_s)
    return groups


def _close(groups: dict[str, WorkerGroup]) -> None:
    """Lets the engines end their child processes, then kills every worker."""
    if "rollout" in groups:
        closing = [worker.close.remote() for worker in groups["rollout"].workers]
        ray.wait(closing, num_returns=len(closing), timeout=CLOSE_TIMEOUT_S)
    for group in groups.values():
        group.close()
