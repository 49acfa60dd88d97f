"""Which worker runs where: planned for the laptop and for the paper's clusters, and reserved on a real Ray.

The real Ray has nodes that claim 8 GPUs each; nothing here starts a worker.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sae_rl.config.compose import load_config
from sae_rl.config.schema import Config
from sae_rl.settings import ConfigError
from sae_rl.workers.group import _advice
from sae_rl.workers.placement import Placement, check_resources, nodes_of_bundles, order_ranks, plan, reserve
from sae_rl.workers.session import check_address
from sae_rl.workers.table import roles_of

FILES = ("task.train.path=/no/train.parquet", "task.evaluation.path=/no/heldout.parquet")
PAPER = {"paper_4b": 8, "paper_8b": 16, "paper_14b": 32}
COLOCATED = ["cluster.colocate_rollout=true", "cluster.rollout.num_workers=8", "rollout.max_engine_losses=0"]
NODE = {"CPU": 32.0, "GPU": 8.0}


def paper(experiment: str, *overrides: str) -> Config:
    return load_config([f"experiment={experiment}", *(FILES if experiment == "one_gpu" else ()), *overrides])


def laptop(*overrides: str) -> Config:
    return load_config(["model.path=nobody/nothing", "model.context_tokens=1024", *overrides])


def placed(config: Config) -> Placement:
    return plan(config, roles_of(config))


def used(placement: Placement, roles: list[str] | None = None) -> list[dict[str, float]]:
    """What the workers take of each bundle, together."""
    taken = [{"CPU": 0.0, "GPU": 0.0} for _ in placement.bundles]
    for role, slots in placement.slots.items():
        for slot in slots if roles is None or role in roles else []:
            taken[slot.bundle]["CPU"] += slot.cpus
            taken[slot.bundle]["GPU"] += slot.gpus
    return taken


CONFIGS = {
    "demo": lambda: laptop("experiment=demo"),
    "demo with a reference": lambda: laptop("experiment=demo", "algorithm.policy_loss.kl_coef=0.1"),
    "demo without a critic": lambda: laptop("algorithm=grpo"),
    "three policy ranks": lambda: laptop("cluster.policy.num_workers=2", "cluster.critic.num_workers=1"),
    **{name: (lambda name=name: paper(name)) for name in PAPER},
    "paper with a reference": lambda: paper("paper_8b", "algorithm.token_rewards.kl_coef=0.1"),
    "paper, each learner with GPUs of its own": lambda: paper("paper_8b", "cluster.share_learner_gpus=false"),
    "paper, engines on the learners' GPUs": lambda: paper("paper_8b", *COLOCATED),
    "paper, fewer critics": lambda: paper("paper_8b", "cluster.critic.num_workers=4"),
    "one GPU": lambda: paper("one_gpu"),
    "one GPU with a reference": lambda: paper("one_gpu", "algorithm.policy_loss.kl_coef=0.1"),
    "two GPUs": lambda: paper("one_gpu", "cluster=gpus_2"),
    "paper, tensor parallel": lambda: paper(
        "paper_8b", "rollout.tensor_parallel_size=4", "cluster.rollout.num_workers=2"
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_worker_fits_into_its_bundle(name: str) -> None:
    config = CONFIGS[name]()
    placement = placed(config)
    assert list(placement.slots) == roles_of(config)
    for role, slots in placement.slots.items():
        assert len(slots) == getattr(config.cluster, role).num_workers
        assert len({slot.bundle for slot in slots}) == len(slots), "two ranks of a role never share"
    for bundle, taken in zip(placement.bundles, used(placement), strict=True):
        assert taken["CPU"] == pytest.approx(bundle["CPU"])
        assert taken["GPU"] <= bundle.get("GPU", 0.0)
        assert taken["GPU"] > 0.49 or "GPU" not in bundle


def test_the_demo_fits_two_cores_with_every_role() -> None:
    placement = placed(laptop("experiment=demo", "algorithm.policy_loss.kl_coef=0.1"))
    assert placement.total == pytest.approx({"CPU": 2.0})
    check_resources(placement, [{"CPU": 2.0, "memory": 1e9}])
    assert placed(laptop("experiment=demo")).bundles == [{"CPU": 0.5}] * 2 + [{"CPU": 0.4}] * 2


@pytest.mark.parametrize(("experiment", "num_gpus"), PAPER.items())
def test_the_papers_clusters(experiment: str, num_gpus: int) -> None:
    """Half of the GPUs sample; on each of the others, policy and critic share."""
    placement = placed(paper(experiment))
    assert placement.total == {"CPU": 4.0 * num_gpus, "GPU": float(num_gpus)}
    assert len(placement.bundles) == num_gpus
    assert {slot.gpus for slot in placement.slots["rollout"]} == {1.0}
    assert {slot.gpus for role in ("policy", "critic") for slot in placement.slots[role]} == {0.5}
    assert [s.bundle for s in placement.slots["policy"]] == [s.bundle for s in placement.slots["critic"]]
    assert not {s.bundle for s in placement.slots["policy"]} & {s.bundle for s in placement.slots["rollout"]}
    check_resources(placement, [NODE] * (num_gpus // 8))


def test_engines_on_the_learners_gpus() -> None:
    """Each GPU has an engine and a rank of every learner, so that weights need no network: half of the GPUs do."""
    placement = placed(paper("paper_8b", *COLOCATED))
    assert placement.total == {"CPU": 64.0, "GPU": 8.0}
    bundles = {role: [slot.bundle for slot in slots] for role, slots in placement.slots.items()}
    assert bundles["rollout"] == bundles["policy"] == bundles["critic"] == list(range(8))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["cluster.rollout.num_workers=4"], r"needs cluster.rollout.num_workers = 8, found 4"),
        (["cluster.share_learner_gpus=false"], r"needs cluster.share_learner_gpus = True, found False"),
        (["rollout.tensor_parallel_size=2"], r"needs rollout.tensor_parallel_size = 1, found 2"),
        (["schedule=overlapped"], r"needs schedule.mode = synchronous, found overlapped"),
        (["rollout.max_engine_losses=1"], r"needs rollout.max_engine_losses = 0, found 1"),
    ],
)
def test_engines_on_the_learners_gpus_need_all_of_this(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        paper("paper_8b", *COLOCATED, *overrides)


def test_small_machines_are_used_whole() -> None:
    placement = placed(paper("one_gpu"))
    assert placement.bundles == [{"CPU": 4.0, "GPU": 1.0}]
    assert list(placement.slots) == ["rollout", "policy", "critic"]
    placement = placed(paper("one_gpu", "cluster=gpus_2"))
    assert placement.bundles == [{"CPU": 2.0, "GPU": 1}, {"CPU": 2.0, "GPU": 1.0}]
    assert placed(paper("paper_8b", "cluster=gpus_8", "learner=offload")).total["GPU"] == 8


def test_a_tensor_parallel_engine_has_its_gpus_on_one_node() -> None:
    placement = placed(CONFIGS["paper, tensor parallel"]())
    assert placement.bundles[:2] == [{"CPU": 4.0, "GPU": 4.0}] * 2
    with pytest.raises(ValueError, match=r"one worker needs 4 CPUs, 4 GPUs on a single node.*tensor_parallel_size"):
        check_resources(placement, [{"CPU": 16.0, "GPU": 2.0}] * 8)


def test_only_the_engines_for_an_evaluation() -> None:
    placement = plan(paper("paper_8b"), ["rollout"])
    assert list(placement.slots) == ["rollout"]
    assert placement.total["GPU"] == 8


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        (
            [NODE, {"CPU": 32.0, "GPU": 7.0}],
            r"needs 16 GPUs .*8 rollout, 8 policy, 8 critic.* has 15 GPUs on 2 node\(s\)",
        ),
        ([{"CPU": 31.0, "GPU": 8.0}, NODE], r"needs 64 CPUs .* has 63 CPUs on 2 node\(s\)"),
        ([{"CPU": 64.0}], r"needs 16 GPUs .* has 0 GPUs on 1 node\(s\)"),
        ([], r"has 0 CPUs and 0 GPUs on 0 node\(s\)"),
        ([{"CPU": 3.0, "GPU": 1.0}] * 32, r"one worker needs 4 CPUs, 1 GPUs on a single node"),
    ],
)
def test_what_is_missing_is_said(nodes: list[dict[str, float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_resources(placed(paper("paper_8b")), nodes)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A Ray without CPUs; tests add nodes. No idle workers are started ahead, however many CPUs a node claims."""
    from ray.cluster_utils import Cluster

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setitem(os.environ, "RAY_prestart_worker_first_driver", "0")
    monkeypatch.setitem(os.environ, "RAY_enable_worker_prestart", "0")
    store = 78 * 2**20  # the least that Ray takes
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "num_gpus": 0, "object_store_memory": store, "include_dashboard": False},
    )
    add_node = cluster.add_node
    cluster.add_node = lambda gpus: add_node(num_cpus=64, num_gpus=gpus, object_store_memory=store)
    import ray

    try:
        ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def assert_neighbours(placement: Placement, nodes: dict[int, str], group_size: int, crossing: int = 0) -> None:
    """All but ``crossing`` groups of policy ranks that share rows lie within a node; roles that share GPUs still do."""
    bundles = {role: [slot.bundle for slot in slots] for role, slots in placement.slots.items()}
    assert bundles["policy"] == bundles["critic"]
    groups = [bundles["policy"][i : i + group_size] for i in range(0, len(bundles["policy"]), group_size)]
    assert sum(len({nodes[bundle] for bundle in group}) > 1 for group in groups) == crossing


@pytest.mark.parametrize(
    ("nodes", "group_size", "crossing"),
    [
        ("abababab", 2, 0),
        ("abababab", 4, 0),
        ("aababbab", 4, 0),
        ("aaabbccc", 2, 1),  # two nodes have an odd number of ranks, so one pair cannot be on one node
        ("abcabcab", 1, 0),
    ],
)
def test_ranks_that_share_rows_are_on_one_node(nodes: str, group_size: int, crossing: int) -> None:
    placement = placed(paper("paper_8b"))
    assert [slot.bundle for slot in placement.slots["policy"]] == list(range(8, 16))
    where = {bundle: "engines" for bundle in range(8)} | {8 + i: node for i, node in enumerate(nodes)}
    assert_neighbours(order_ranks(placement, where, group_size), where, group_size, crossing)


def ray_nodes() -> list[dict[str, float]]:
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def assert_reserved(experiment: str, num_nodes: int) -> None:
    from ray.util import remove_placement_group

    placement = placed(paper(experiment))
    check_resources(placement, ray_nodes())
    group = reserve(placement, timeout_s=60)
    try:
        where = nodes_of_bundles(group)
        assert sorted(where) == list(range(len(placement.bundles)))
        on_node = [sum(placement.bundles[b]["GPU"] for b in where if where[b] == n) for n in set(where.values())]
        assert on_node == [8.0] * num_nodes
        ordered = order_ranks(placement, where, group_size=2)
        assert_neighbours(ordered, where, group_size=2)
    finally:
        remove_placement_group(group)


def assert_missing(experiment: str, found: int) -> None:
    wanted = PAPER[experiment]
    with pytest.raises(ValueError, match=rf"needs {wanted} GPUs .* but Ray has {found} GPUs on"):
        check_resources(placed(paper(experiment)), ray_nodes())


@pytest.mark.alone
def test_the_papers_runs_are_reserved_on_a_real_ray(cluster: Any) -> None:
    check_address(paper("paper_4b", f"cluster.address={cluster.address}"))
    spare = cluster.add_node(7)
    assert_missing("paper_4b", found=7)
    cluster.remove_node(spare)
    cluster.add_node(8)
    cluster.wait_for_nodes()
    assert_reserved("paper_4b", num_nodes=1)
    assert_missing("paper_8b", found=8)
    cluster.add_node(8)
    assert_reserved("paper_8b", num_nodes=2)
    assert_missing("paper_14b", found=16)
    cluster.add_node(8)
    last = cluster.add_node(7)
    assert_missing("paper_14b", found=31)
    cluster.remove_node(last)
    cluster.add_node(8)
    cluster.wait_for_nodes()
    assert_reserved("paper_14b", num_nodes=4)


@pytest.mark.alone
def test_what_others_hold_is_waited_for_and_then_said(cluster: Any) -> None:
    from ray.util import remove_placement_group

    cluster.add_node(8)
    placement = placed(paper("paper_4b"))
    held = reserve(placement, timeout_s=60)
    with pytest.raises(TimeoutError, match=r"within cluster\.start_timeout_s = 1 s.*ray status"):
        reserve(placement, timeout_s=1)
    remove_placement_group(held)
    again = reserve(placement, timeout_s=60)  # what was given up above holds nothing
    remove_placement_group(again)


@pytest.mark.alone
def test_the_command_line_asks_the_real_ray(
    sae_rl: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More GPUs than a Ray of its own has: exit code 2, one line, and Ray is gone again."""
    import ray

    outcome = sae_rl(
        "train",
        f"model.path={tiny_model}",
        "output_dir=out",
        "logger=off",
        "cluster.device=cuda",
        "rollout.max_response_tokens=64",
    )
    assert outcome.code == 2, outcome.stderr
    (line,) = [line for line in outcome.lines if line.startswith("error: ")]  # Ray itself may speak above it
    assert line == outcome.lines[-1]
    assert line.startswith("error: the run needs 4 GPUs for its workers (2 rollout, 1 policy, 1 critic)")
    assert "Traceback" not in outcome.stderr
    assert not ray.is_initialized()


@pytest.mark.parametrize(
    ("role", "text", "key"),
    [
        ("policy", "CUDA out of memory. Tried to allocate 2.00 GiB", "learner.policy.micro_batch_tokens"),
        ("reference", "CUDA out of memory.", "learner.policy.micro_batch_tokens"),
        ("critic", "DefaultCPUAllocator: can't allocate memory: you tried", "learner.critic.micro_batch_tokens"),
        ("critic", "Task was killed due to the node running low on memory.", "learner.critic.zero_stage"),
        ("rollout", "CUDA out of memory.", "rollout.gpu_memory_utilization"),
    ],
)
def test_where_memory_ran_out_the_message_says_which_key_to_change(role: str, text: str, key: str) -> None:
    assert key in _advice(role, text)
    assert _advice(role, "Connection reset by peer") == _advice(role, "there is no room left") == ""
