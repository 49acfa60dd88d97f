"""Connects to Ray, and starts and ends a run's workers."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import psutil
import ray
from ray._private import services
from ray.util.placement_group import PlacementGroup, remove_placement_group

from sae_rl.config.schema import Config
from sae_rl.garbage import collect_as_usual
from sae_rl.records.clock import Clock
from sae_rl.settings import ConfigError
from sae_rl.types import Prompt
from sae_rl.workers.group import WorkerGroup, start_worker
from sae_rl.workers.placement import Placement, check_resources, nodes_of_bundles, order_ranks, plan, reserve
from sae_rl.workers.run_workers import RunWorkers
from sae_rl.workers.table import WORKERS, roles_of

CLOSE_TIMEOUT_S = 4.0
CONNECT_TIMEOUT_S = 5.0
RAY_CLIENT_PORT = "10001"  # where Ray's documentation has it if ray://HOST names none

# It says at every start that a local Ray asks its own processes for a token, as Ray does unless it is told otherwise.
logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)


def check_address(config: Config) -> None:
    """Raises ConfigError if no Ray answers at ``cluster.address``, where Ray itself would wait for minutes."""
    address = _address(config)
    try:
        if address == "auto":
            address = services.canonicalize_bootstrap_address(address)
        if address is None or address == "local":
            return
        scheme, _, place = address.rpartition("://")
        if scheme not in ("", "ray"):
            return  # a plug-in of Ray knows it
        host, _, port = place.rpartition(":") if ":" in place or not scheme else (place, ":", RAY_CLIENT_PORT)
        if not host or not port.isdecimal():
            raise ConnectionError("an address is auto, HOST:PORT or ray://HOST:PORT")
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
        _greet(f"{host}:{port}", is_client=scheme == "ray")
    except (OSError, UnicodeError) as error:  # a host's name may be none
        raise ConfigError([f"cluster.address = {address!r}: no Ray cluster answers there ({error})"]) from error


def _greet(address: str, is_client: bool) -> None:
    """Asks what listens there whether it is Ray. Raises ConnectionError if it does not answer as Ray.

    Args:
        is_client: Ray's client server is asked, and otherwise the head's control store.
    """
    import grpc
    from ray._private.gcs_utils import create_gcs_channel
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc, ray_client_pb2, ray_client_pb2_grpc

    channel = create_gcs_channel(address)
    try:
        if is_client:
            driver = ray_client_pb2_grpc.RayletDriverStub(channel)
            ping = ray_client_pb2.ClusterInfoRequest(type=ray_client_pb2.ClusterInfoType.PING)
            driver.ClusterInfo(ping, timeout=CONNECT_TIMEOUT_S)
        else:
            store = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
            store.CheckAlive(gcs_service_pb2.CheckAliveRequest(), timeout=CONNECT_TIMEOUT_S)
    except grpc.RpcError as error:
        if error.code() in (  # others, such as a missing token, come from a Ray
            grpc.StatusCode.UNAVAILABLE,
            grpc.StatusCode.DEADLINE_EXCEEDED,
            grpc.StatusCode.UNIMPLEMENTED,
        ):
            late = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            what = f"no answer within {CONNECT_TIMEOUT_S:g} s" if late else "something other than Ray listens"
            raise ConnectionError(f"{what}: {error.code().name}") from error
    finally:
        channel.close()


def _address(config: Config) -> str | None:
    return config.cluster.address or os.environ.get("RAY_ADDRESS") or None


@contextlib.contextmanager
def ray_session(config: Config) -> Iterator[None]:
    """Joins the Ray cluster at ``cluster.address``, or starts a local one and ends it afterwards."""
    address = _address(config)
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
    collect_as_usual()
    signal.signal(signal.SIGTERM, terminate)  # Ray's handler would end Ray before the workers are closed
    try:
        yield
    finally:
        ours = _ray_processes()
        ray.shutdown()
        for child in ours:  # Ray's agents need a minute to notice that their raylet is gone
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()


def _ray_processes() -> list[psutil.Process]:
    """Ray's workers and agents under this process."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended since it was listed
            if child.name().startswith("ray::"):
                found.append(child)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptEngines:
    """Rollout engines whose run has ended, in the bundles that Ray reserved for all of its workers."""

    placement: Placement
    settings: tuple[object, ...]
    reserved: PlacementGroup
    group: WorkerGroup


class Session:
    """What runs have in common that follow each other in one process: the connection to Ray, and rollout engines.

    A run uses the engines of the run before it where their settings and the placement are the same. Its first weight sync
    gives them its own weights. After a run that failed, the next one starts everything anew.
    """

    def __init__(self) -> None:
        self._joined: str | None = None
        self._ray = contextlib.ExitStack()
        self._kept: KeptEngines | None = None

    @contextlib.contextmanager
    def ray(self, config: Config) -> Iterator[None]:
        """`ray_session`, which stays open until `close` if the run succeeds."""
        address = _address(config)
        if self._joined != (address or "local"):
            self.close()
            self._ray.enter_context(ray_session(config))
            self._joined = address or "local"
        try:
            yield
        except BaseException:
            self.close()
            raise

    def take(self, placement: Placement, settings: tuple[object, ...]) -> KeptEngines | None:
        """Engines that fit, or None. Others are closed, since the run needs their resources."""
        kept = self._kept
        if kept is not None and (kept.placement, kept.settings) != (placement, settings):
            self._close_engines()
            kept = None
        self._kept = None
        return kept

    def keep(self, engines: KeptEngines) -> None:
        self._kept = engines

    def close(self) -> None:
        try:
            self._close_engines()
        finally:
            self._joined = None
            self._ray.close()

    def _close_engines(self) -> None:
        kept, self._kept = self._kept, None
        if kept is not None:
            _close({"rollout": kept.group})
            remove_placement_group(kept.reserved)


@contextlib.contextmanager
def start_workers(
    config: Config,
    probe_prompts: list[Prompt],
    clock: Clock,
    roles: list[str] | None = None,
    note: Callable[[str], None] = print,
    session: Session | None = None,
) -> Iterator[RunWorkers]:
    """Places and starts the workers of ``roles`` (None: of every role that a training run needs); kills them at the end.

    Args:
        probe_prompts: prompts that a weight sync is checked with; none are needed without policy workers.
        note: prints a line for the user, such as that an engine was replaced.
        session: keeps the engines for the next run if this one succeeds.

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
    settings = (config.cluster, *WORKERS["rollout"].settings(config))
    kept = None if session is None else session.take(placement, settings)
    reserved: PlacementGroup | None
    reserved = reserve(placement, config.cluster.start_timeout_s, note) if kept is None else kept.reserved
    groups = {} if kept is None else {"rollout": kept.group}
    if kept is not None:
        note("the rollout engines of the run before are used again")
    try:
        ordered = order_ranks(placement, nodes_of_bundles(reserved), config.learner.sequence_parallel_size)
        _spawn(config, ordered, reserved, groups)
        workers = RunWorkers(config, groups, probe_prompts, clock, note)
        workers.start(loaded=[] if kept is None else ["rollout"])
        yield workers
        if session is not None and workers.has_idle_engines:
            engines = groups.pop("rollout")
            session.keep(KeptEngines(placement=placement, settings=settings, reserved=reserved, group=engines))
            reserved = None
    finally:
        _close(groups)
        if reserved is not None:
            remove_placement_group(reserved)


def _spawn(config: Config, placement: Placement, group: PlacementGroup, groups: dict[str, WorkerGroup]) -> None:
    """Adds the processes of each role that ``groups`` does not have yet."""
    for role, slots in placement.slots.items():
        if role in groups:
            continue
        threads = getattr(config.cluster, role).threads_per_worker
        env = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        if config.cluster.device == "cpu" and role != "rollout":
            env["DS_ACCELERATOR"] = "cpu"
        starts = [functools.partial(start_worker, WORKERS[role], slot, group, env) for slot in slots]
        groups[role] = WorkerGroup(role, starts, config.cluster.call_timeout_s)


def _close(groups: dict[str, WorkerGroup]) -> None:
    """Lets the engines end their child processes, then kills every worker."""
    if "rollout" in groups:
        closing = [worker.close.remote() for worker in groups["rollout"].workers]
        ray.wait(closing, num_returns=len(closing), timeout=CLOSE_TIMEOUT_S)
    for group in groups.values():
        group.close()
