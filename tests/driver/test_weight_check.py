"""What a weight sync refuses: wrong checksums, and logprobs that differ. What it must not refuse: the tails of bfloat16."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import ray
import torch
from torch import Tensor

from sae_rl.backends.weight_transfer import HeldWeights, TransferFailed
from sae_rl.config.schema import Config, RolloutConfig
from sae_rl.types import Batch, Prompt, Rollout, Scores
from sae_rl.workers import engine_client, group
from sae_rl.workers.engine_client import EngineClient
from sae_rl.workers.group import Call, WorkerError, wait_for
from sae_rl.workers.weight_check import LogprobDifferences, WeightCheck
from sae_rl.workers.weight_sync import PROBE_TOKENS, WeightSync

from .scripted import make_config, make_prompts

SENT = {"embed": 1, "q": 2, "k": 3, "down": 4}
FIRST = HeldWeights(received=SENT, unloaded=(), held={"embed": 10, "qk": 20, "down": 30})  # of tensor-parallel rank 0
SECOND = replace(FIRST, held={"embed": 11, "qk": 21, "down": 31})
ENGINES = {0: [FIRST, SECOND], 3: [FIRST, SECOND]}


def test_checksums_that_agree() -> None:
    check = WeightCheck()
    check(SENT, ENGINES)
    check(SENT, {3: [FIRST, SECOND]})  # the same weights once more, to a replacement
    sent = SENT | {"embed": 101, "q": 102}
    first = replace(FIRST, received=sent, held=FIRST.held | {"embed": 110, "qk": 120})
    second = replace(SECOND, received=sent, held=SECOND.held | {"qk": 121})  # its rows of the embedding did not change
    check(sent, {0: [first, second], 3: [first, second]})


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            replace(SECOND, received=SENT | {"q": 5, "k": 6}),
            "engine 3, process 1 received other tensors than the policy sent: k, q;",
        ),
        (replace(SECOND, received={"embed": 1}), "received other tensors than the policy sent: down, k, q;"),
        (
            replace(SECOND, unloaded=("lm_head",)),
            "engine 3, process 1 did not get all weights of some layers: lm_head;",
        ),
        (
            replace(SECOND, held=SECOND.held | {"qk": 0}),
            "engine 3, process 1 holds other weights than rollout engine 0: qk;",
        ),
    ],
)
def test_one_process_of_one_engine(weights: HeldWeights, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        WeightCheck()(SENT, ENGINES | {3: [FIRST, weights]})


@pytest.mark.parametrize("which", ["sent", "held"])
def test_engines_that_all_keep_old_weights_or_take_others(which: str) -> None:
    check = WeightCheck()
    check(SENT, ENGINES)
    sent, held = SENT, FIRST.held
    if which == "sent":
        sent = SENT | {"down": 40}
    else:
        held = FIRST.held | {"down": 300}
    both = [replace(FIRST, received=sent, held=held), replace(SECOND, received=sent)]
    with pytest.raises(RuntimeError, match="kept weights that changed, or changed weights that did not: down;"):
        check(sent, {0: both, 3: both})


def test_a_policy_that_sends_its_old_weights() -> None:
    check = WeightCheck()
    assert check(SENT, ENGINES, was_updated=True) == 1.0
    assert check(SENT, ENGINES) == 0.0
    with pytest.raises(
        RuntimeError, match="the policy was updated, but it sent the same weights as before: down, embed"
    ):
        check(SENT, ENGINES, was_updated=True)
    sent = SENT | {"q": 20}
    first, second = (replace(each, received=sent, held=each.held | {"qk": 0}) for each in (FIRST, SECOND))
    assert check(sent, {0: [first, second]}, was_updated=True) == 0.25


@pytest.fixture
def bfloat16(tmp_path: Path) -> RolloutConfig:
    """The tolerances of the paper's runs."""
    return make_config(tmp_path, "rollout=paper", "rollout.kv_cache_gb=1").rollout


def heavy_tailed(draw: torch.Generator, num_tokens: int) -> Tensor:
    """|Student's t| with 2 degrees of freedom and a mean of 0.01 nats: single tokens reach 0.5 in a few thousand."""
    normal = torch.randn(num_tokens, 3, generator=draw, dtype=torch.float64)
    t = normal[:, 0] / (normal[:, 1:].square().mean(1)).sqrt()
    return (0.01 / 2**0.5 * t).abs()


def test_600_syncs_with_the_tails_of_bfloat16(bfloat16: RolloutConfig) -> None:
    draw = torch.Generator().manual_seed(0)
    syncs = [LogprobDifferences({0: heavy_tailed(draw, PROBE_TOKENS)}) for _ in range(600)]
    assert all(sync.are_within(bfloat16) for sync in syncs)
    largest = torch.tensor([sync.metrics()["sync/logprob_diff_max"] for sync in syncs])
    assert 10 < int((largest > 0.5).sum()) < 200, "a limit on the largest would have ended the run many times"
    assert float(torch.cat([sync.all for sync in syncs]).mean()) == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize(("fraction", "nats"), [(1.0, 0.06), (0.02, 1.0)])
def test_a_difference_of_all_tokens_or_of_one_in_fifty(bfloat16: RolloutConfig, fraction: float, nats: float) -> None:
    draw = torch.Generator().manual_seed(1)
    tokens = heavy_tailed(draw, PROBE_TOKENS)
    tokens[: int(fraction * PROBE_TOKENS) + 1] += nats
    differences = LogprobDifferences({0: heavy_tailed(draw, 16), 5: tokens})
    assert not differences.are_within(bfloat16)
    error = str(differences.error(bfloat16, 7))
    assert "after sending weights 7" in error and "largest for engine 5" in error
    assert "rollout.logprob_tolerance_mean = 0.05" in error


def test_nan_is_refused(bfloat16: RolloutConfig) -> None:
    tokens = torch.zeros(PROBE_TOKENS)
    tokens[3] = float("nan")
    assert not LogprobDifferences({0: tokens}).are_within(bfloat16)


class Pool:
    """The pool of one engine, whose probes differ by what the test says, and the policy."""

    def __init__(self, config: Config, differences: list[float]) -> None:
        self.asked: list[str] = []
        self.differences = differences
        self.engines = SimpleNamespace(
            group=SimpleNamespace(workers=["an engine"]),
            hold=lambda ranks, version: self.asked.append(f"hold {version}"),
            settle=lambda: [0],
            num_lost=0,
        )
        self.sync = WeightSync(config, cast(Any, self), cast(Any, self), threading.Lock(), [], self.score)

    def wake(self) -> None:
        pass

    def run(self, call: Any, ranks: list[int]) -> list[tuple[str, int]]:
        return [("address", 1)]

    def probe(self, ranks: list[int], prompts: list[Prompt], num: int, max_tokens: int, again: bool) -> list[Any]:
        self.asked.append(f"probe of {num} x {max_tokens}{' again' * again}")
        rollout = Rollout(
            prompt=make_prompts(1)[0],
            sample=0,
            token_ids=torch.ones(max_tokens, dtype=torch.int64),
            rollout_logprobs=torch.full((max_tokens,), self.differences.pop(0)),
            text="",
            finish_reason="length",
            policy_versions=torch.zeros(max_tokens, dtype=torch.int64),
            temperature=1.0,
        )
        return [[rollout] * num]

    def score(self, batch: Batch) -> Scores:
        return Scores(old_logprobs=torch.zeros(batch.num_tokens), values=None, ref_logprobs=None)

    def answer(self, phase: str, call: Any) -> list[Any]:
        """Stands in for the policy's ranks."""
        self.asked.append(phase)
        return [(SENT, ENGINES), ({}, {})]


@pytest.mark.parametrize("differences", [[0.0], [0.2, 0.001], [0.2, 0.3]])
def test_a_probe_is_repeated_once(tmp_path: Path, differences: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(tmp_path, "rollout.logprob_tolerance_mean=0.1", "rollout.logprob_tolerance_p99=0.25")
    pool = Pool(config, list(differences))
    monkeypatch.setattr(pool.sync, "_ask_policy", pool.answer)
    if differences[-1] > 0.1:
        with pytest.raises(RuntimeError, match=r"differ on 512 sampled tokens by 0\.3 nats on average"):
            pool.sync.sync(1)
    else:
        metrics = pool.sync.sync(1)
        assert metrics["sync/logprob_diff_mean"] == pytest.approx(differences[-1])
        assert metrics["sync/logprob_diff_max"] == pytest.approx(max(differences))
    probes = ["probe of 64 x 8", "probe of 64 x 8 again"][: len(differences)]
    assert pool.asked == ["connect to rollout engines", "send weights", "hold 1", *probes]


class FakeRay:
    """Remote calls that were answered, failed, or never end."""

    exceptions = ray.exceptions

    def __init__(self, answers: dict[str, Any]) -> None:
        self.answers = answers

    def wait(self, calls: list[str], timeout: float, num_returns: int = 1) -> tuple[list[str], list[str]]:
        done = [call for call in calls if call in self.answers][:num_returns]
        if not done:
            time.sleep(timeout)
        return done, [call for call in calls if call not in done]

    def get(self, call: str) -> Any:
        if isinstance(self.answers[call], Exception):
            raise self.answers[call]
        return self.answers[call]


def client_of(answers: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> EngineClient:
    monkeypatch.setattr(engine_client, "ray", FakeRay(answers))
    remote = {rank: SimpleNamespace(remote=lambda *_, rank=rank: f"call {rank}") for rank in (2, 4)}
    names = ("init_weight_transfer", "start_weight_update", "update_weights", "finish_weight_update")
    engines: Any = {rank: SimpleNamespace(**dict.fromkeys(names, call)) for rank, call in remote.items()}
    return EngineClient(engines, 2, timeout_s=0.1)


def test_a_transfer_has_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    client = client_of({"call 2": None}, monkeypatch)
    phases = {
        "connect": lambda: client.init_weight_transfer_engine({"rank_offset": 1}),
        "pause": client.start_weight_update,
        "receive weights": lambda: client.update_weights({}),
        "load weights": client.finish_weight_update,
    }
    for phase, call in phases.items():
        client.begin("1")
        late = rf"engine\(s\) 4 did not {phase} within rollout.sync_timeout_s = 0.1 s"
        with pytest.raises(TransferFailed, match=late):
            call()
        with pytest.raises(TransferFailed, match=late):  # the limit is that of the whole transfer
            call()


def test_the_first_engine_that_fails_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others may wait for it forever."""
    died = ray.exceptions.RayActorError()
    client = client_of({"call 4": died}, monkeypatch)
    client.begin("1")
    with pytest.raises(TransferFailed, match="rollout engine 4 did not receive weights: The actor"):
        client.update_weights({})


def test_what_engines_hold_comes_by_their_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    client = client_of({"call 4": [SECOND], "call 2": [FIRST]}, monkeypatch)
    client.begin("1")
    client.finish_weight_update()
    assert client.held == {2: [FIRST], 4: [SECOND]}


def test_a_policy_that_hangs_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its role, what it was asked, and the key of the limit; its engines are not replaced for that."""
    monkeypatch.setattr(group, "ray", FakeRay({"call 0": None}))
    policy: Any = SimpleNamespace(role="policy", last_lines=lambda _: "", result=lambda *_: None)
    with pytest.raises(WorkerError) as late:
        wait_for([Call(policy, {0: "call 0", 1: "call 1"})], 0.1, doing="send weights", key="rollout.sync_timeout_s")
    assert str(late.value) == "worker(s) policy 1 did not send weights within 0.1 s (rollout.sync_timeout_s)"
    assert late.value.died == "policy"
