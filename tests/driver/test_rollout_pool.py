"""When engines that share the learners' GPUs sleep and wake; what they answer is tested with the real ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from sae_rl.config.schema import Config
from sae_rl.types import Sampling
from sae_rl.workers.engines import Engines
from sae_rl.workers.group import WorkerGroup
from sae_rl.workers.rollout_pool import RolloutPool

from .scripted import make_config, make_prompts


class Recording:
    """A group of workers that writes down what each is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, str]] = []
        self.workers = [Asked(self, rank) for rank in range(2)]

    def run(self, call: Any, ranks: list[int]) -> list[Any]:
        return [call(self.workers[rank]) for rank in ranks]


class Asked:
    def __init__(self, group: Recording, rank: int) -> None:
        self._group, self._rank = group, rank

    def __getattr__(self, name: str) -> Any:
        def remote(*_: Any) -> None:
            self._group.asked.append((self._rank, name))

        return type("Method", (), {"remote": staticmethod(remote)})


def pool_of(config: Config) -> tuple[RolloutPool, Recording]:
    group = Recording()
    return RolloutPool(Engines(cast(WorkerGroup, group), config, start=Any, sync_one=Any, note=print), config), group


def test_engines_that_share_gpus_sleep_once_and_wake_for_work(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    pool, group = pool_of(
        config.model_copy(update={"cluster": config.cluster.model_copy(update={"colocate_rollout": True})})
    )
    pool.sleep()
    assert group.asked == [], "they start asleep"
    groups = pool.open(group_size=2, sampling=Sampling(max_tokens=8))
    groups.add(make_prompts(2), "step 0")
    assert group.asked == [(0, "wake"), (1, "wake")], "once, and not for every prompt"
    pool.sleep()
    pool.sleep()
    assert group.asked[2:] == [(0, "sleep"), (1, "sleep")]
    pool.wake()
    assert group.asked[4:] == [(0, "wake"), (1, "wake")]


def test_others_never_sleep(tmp_path: Path) -> None:
    pool, group = pool_of(make_config(tmp_path))
    pool.sleep()
    pool.open(group_size=2, sampling=Sampling(max_tokens=8)).add(make_prompts(2), "step 0")
    pool.wake()
    assert group.asked == []
