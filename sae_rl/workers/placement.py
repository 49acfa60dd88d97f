"""The bundles of CPUs and GPUs that workers run in, checked against Ray's resources before anything waits for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from sae_rl.config.schema import Config

Resources = dict[str, float]
NOTE_S = 10.0  # a reservation that takes longer is a line on the console


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """The share of a bundle that one worker gets."""

    bundle: int
    cpus: float
    gpus: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Bundles to reserve, and for each role its workers' slots by rank."""

    bundles: list[Resources]
    slots: dict[str, list[Slot]]

    @property
    def total(self) -> Resources:
        names = sorted({name for bundle in self.bundles for name in bundle})
        return {name: sum(bundle.get(name, 0.0) for bundle in self.bundles) for name in names}


def plan(config: Config, roles: Sequence[str]) -> Placement:
    """Lays out bundles: one per engine and one per learner, or one per rank where roles share GPUs.

    With ``cluster.share_learner_gpus`` rank i of all learners shares a bundle, with ``cluster.colocate_rollout`` an engine
    as well.
    """
    cluster = config.cluster
    on_gpu = cluster.device == "cuda"
    sharing: list[str] = []
    if cluster.shares_learner_gpus:
        sharing = [role for role in roles if role != "rollout" or cluster.colocate_rollout]
    bundles: list[Resources] = []
    slots: dict[str, list[Slot]] = {}
    for role in roles:
        if role not in sharing:
            workers = getattr(cluster, role)
            gpus = config.rollout.tensor_parallel_size if role == "rollout" else 1
            gpus = gpus if on_gpu else 0
            cpus, first = workers.cpus_per_worker, len(bundles)
            bundles += [{"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus} for _ in range(workers.num_workers)]
            slots[role] = [Slot(bundle=first + rank, cpus=cpus, gpus=gpus) for rank in range(workers.num_workers)]
    first = len(bundles)
    for role in sharing:
        workers, gpus = getattr(cluster, role), round(1 / len(sharing), 3)
        cpus, slots[role] = workers.cpus_per_worker, []
        for bundle in range(first, first + workers.num_workers):
            if bundle == len(bundles):
                bundles.append({"CPU": 0.0, "GPU": 1.0})
            bundles[bundle]["CPU"] += cpus
            slots[role].append(Slot(bundle=bundle, cpus=cpus, gpus=gpus))
    return Placement(bundles=bundles, slots=slots)


def check_resources(placement: Placement, nodes: Sequence[Mapping[str, float]]) -> None:
    """Checks that Ray's nodes have what a run needs.

    Args:
        placement: the bundles that the run needs.
        nodes: the resources of each living node.

    Raises:
        ValueError: Ray has too little in sum, or no single node has room for one of the workers.
    """
    has = {name: sum(node.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU")}
    short = [name for name, wanted in placement.total.items() if wanted > has[name]]
    if short:
        counts = ", ".join(f"{len(slots)} {role}" for role, slots in placement.slots.items())
        needs = " and ".join(f"{placement.total[name]:g} {name}s" for name in short)
        found = " and ".join(f"{has[name]:g} {name}s" for name in short)
        raise ValueError(
            f"the run needs {needs} for its workers ({counts}), but Ray has {found} on {len(nodes)} node(s); lower "
            "cluster.*.num_workers or cpus_per_worker, or join a larger cluster with cluster.address"
        )
    for bundle in placement.bundles:
        if not any(all(node.get(name, 0.0) >= amount for name, amount in bundle.items()) for node in nodes):
            wanted_text = ", ".join(f"{amount:g} {name}s" for name, amount in bundle.items())
            raise ValueError(
                f"one worker needs {wanted_text} on a single node, but no node of the Ray cluster has that; lower "
                "rollout.tensor_parallel_size or cluster.*.cpus_per_worker"
            )


def reserve(placement: Placement, timeout_s: float, note: Callable[[str], None] = print) -> PlacementGroup:
    """Reserves all bundles at once, packed on as few nodes as possible. ``note`` prints a line if that takes long.

    Raises:
        TimeoutError: other jobs hold the resources.
    """
    group = placement_group(placement.bundles, strategy="PACK")
    is_ready = group.wait(timeout_seconds=min(NOTE_S, timeout_s))
    if not is_ready and timeout_s > NOTE_S:
        note(f"waiting for {placement.total}, which other jobs of the Ray cluster may hold: at most {timeout_s:g} s")
        is_ready = group.wait(timeout_seconds=timeout_s - NOTE_S)
    if not is_ready:
        remove_placement_group(group)
        raise TimeoutError(
            f"Ray did not free {placement.total} within cluster.start_timeout_s = {timeout_s:g} s; it has "
            f"{ray.available_resources()} free. Other jobs may hold the rest: see `ray status`"
        )
    return group


def nodes_of_bundles(group: PlacementGroup) -> dict[int, str]:
    """Ray's id of the node that has each bundle."""
    nodes: dict[int, str] = placement_group_table(group)["bundles_to_node_id"]
    return nodes


def order_ranks(placement: Placement, nodes: Mapping[int, str], group_size: int) -> Placement:
    """Orders each role's ranks by node, so that as many as can of the groups that share rows lie within a node.

    Args:
        nodes: the node that has each bundle.
        group_size: ranks, consecutive by index, that share rows.
    """
    return replace(
        placement, slots={role: _by_node(slots, nodes, group_size) for role, slots in placement.slots.items()}
    )


def _by_node(slots: Sequence[Slot], nodes: Mapping[int, str], group_size: int) -> list[Slot]:
    whole_groups, others = [], []
    for node in dict.fromkeys(nodes[slot.bundle] for slot in slots):
        here = [slot for slot in slots if nodes[slot.bundle] == node]
        end = len(here) - len(here) % group_size
        whole_groups += here[:end]
        others += here[end:]
    return whole_groups + others
