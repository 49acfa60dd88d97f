"""Weights on their way to GPUs, with vLLM's own engines and no GPU: what each rank does in which order, and what arrives."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen2Config
from vllm import SamplingParams
from vllm.config import CacheConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from sae_rl.backends import weight_sender
from sae_rl.backends.vllm import FIRST, RolloutEngine
from sae_rl.backends.vllm import Request as OurRequest
from sae_rl.backends.weight_transfer import HeldWeights, TransferFailed, buckets, checksum
from sae_rl.types import Sampling
from sae_rl.workers.engine_client import EngineClient
from sae_rl.workers.policy import PolicyWorker
from sae_rl.workers.weight_check import WeightCheck
from tests.backends.gpu_transfer import World, replace_cuda_ipc

pytestmark = pytest.mark.slow  # vLLM's imports take ten seconds
BUCKET_BYTES = 100
LOST = "rollout engine 0 did not receive weights: it died"


def made_up() -> dict[str, Tensor]:
    """80, 64, 100, 240, 8 and 20 bytes: a bucket may end exactly at the limit, or with a tensor larger than it."""
    shapes = {"embed": (20,), "a": (4, 4), "exact": (25,), "large": (60,), "norm": (4,), "last": (5,)}
    draw = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    return tensors | {"norm": tensors["norm"].bfloat16(), "a": tensors["a"].t()}  # "a" is not contiguous


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_sender, "BUCKET_BYTES", BUCKET_BYTES)


def arrived(world: World, sent: dict[str, int]) -> None:
    for worker in world.workers:
        assert list(worker.model.loaded) == list(world.tensors)
        for name, tensor in world.tensors.items():
            found = worker.model.loaded[name]
            assert found.dtype == tensor.dtype and torch.equal(found, tensor), name
        assert worker.received == sent == {name: int(checksum(tensor)) for name, tensor in world.tensors.items()}


def test_all_ranks_gather_a_bucket_before_rank_0_sends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """No rank begins the next bucket before its work on this one is done, so collectives of two kinds never mix."""
    world = World(made_up(), monkeypatch, num_ranks=3)
    sent, *others = world.send()
    arrived(world, sent)
    assert others == [{}, {}]
    # The limit is the largest tensor's 240 bytes; vLLM's engine cuts behind the tensor that exceeds it.
    in_buckets = [(["embed", "a", "exact"], 244), (["large", "norm"], 248), (["last"], 20)]
    gathers = [[f"gather {name}" for name in names] for names, _ in in_buckets]
    sends = [f"broadcast {size}" for _, size in in_buckets]
    of_sender = [
        "synchronize",
        *(event for g, send in zip(gathers, sends, strict=True) for event in (*g, "wait", send, "wait")),
    ]
    of_others = ["synchronize", *(event for g in gathers for event in (*g, "wait"))]
    assert world.events == [[*of_sender, "wait"], [*of_others, "wait"], [*of_others, "wait"]]


@pytest.mark.parametrize(
    ("sizes", "found"),
    [
        ([], []),
        ([5], [[0]]),
        ([50, 50, 1], [[0, 1, 2]]),
        ([50, 51, 1], [[0, 1], [2]]),
        ([300, 300], [[0], [1]]),
        ([100, 1, 100, 1], [[0, 1], [2, 3]]),
    ],
)
def test_buckets(sizes: list[int], found: list[list[int]]) -> None:
    assert [list(bucket) for bucket in buckets(sizes, BUCKET_BYTES)] == found


@pytest.mark.parametrize("loses", [1, 2, 3])
def test_checksums_tell_which_tensors_did_not_arrive(monkeypatch: pytest.MonkeyPatch, loses: int) -> None:
    world = World(made_up(), monkeypatch, loses=loses)
    sent, _ = world.send()
    lost = [{"embed", "a", "exact"}, {"large", "norm"}, {"last"}][loses - 1]
    for worker in world.workers:
        assert {name for name in sent if worker.received[name] != sent[name]} == lost
        with pytest.raises(RuntimeError, match=", ".join(sorted(lost))):
            WeightCheck()(sent, {0: [HeldWeights(received=worker.received, unloaded=(), held={})]})


def test_an_engine_that_is_lost_in_a_transfer_ends_the_broadcast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 would wait for it forever. All ranks gather the rest, so that they can work on."""
    world = World(made_up(), monkeypatch, fails_at=1)
    error, other = world.send()
    assert isinstance(error, TransferFailed) and str(error) == LOST
    assert other == {} and world.num_destroyed == world.num_broadcasts == 1
    for events in world.events:
        assert [e for e in events if e.startswith("gather")] == [f"gather {name}" for name in world.tensors]


def test_cuda_ipc_takes_tensors_larger_than_a_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(made_up(), monkeypatch)
    replace_cuda_ipc(world, monkeypatch)
    sent, other = world.send(shares_gpus=True)
    arrived(world, sent)
    assert other == {} and world.num_updates == 4  # chunks of at most 240 bytes


def test_an_engine_that_is_lost_over_cuda_ipc_leaves_no_rank_in_a_barrier(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(made_up(), monkeypatch, fails_at=2)
    replace_cuda_ipc(world, monkeypatch)
    error, other = world.send(shares_gpus=True)
    assert isinstance(error, TransferFailed) and str(error) == LOST
    assert other == {} and world.num_updates == 2, "nothing more is asked of the engines"
    assert world.events[0] == world.events[1]


def test_the_buffer_holds_the_embedding_of_an_8b_model(monkeypatch: pytest.MonkeyPatch) -> None:
    embedding = torch.empty(151936, 4096, dtype=torch.bfloat16, device="meta")
    world = World({"embed": embedding, "norm": torch.zeros(4)}, monkeypatch, num_ranks=1)
    replace_cuda_ipc(world, monkeypatch)
    learner = world.learner(0)
    world.rank.index = 0
    options: dict[str, Any] = {"address": "", "port": 0, "world_size": 2, "timeout_s": 1.0}
    for shares_gpus in (True, False):
        sender = weight_sender.Sender(learner, world, shares_gpus=shares_gpus, **options)
        assert sender._engine.packed_buffer_size_bytes == 151936 * 4096 * 2 > 2**30


def test_a_checksum_is_of_all_bytes_and_their_order() -> None:
    draw = torch.Generator().manual_seed(0)
    tensor = torch.randn(70_001, generator=draw).bfloat16()
    same = int(checksum(tensor))
    assert same == int(checksum(torch.cat([tensor[:1], tensor])[1:])), "at another address"
    changed = [tensor.clone() for _ in range(4)]
    changed[0][-1] += 1
    changed[1][[0, 70_000]] = tensor[[70_000, 0]]
    changed[2][:8] = -tensor[:8]
    changed[3].view(torch.int16)[5:70_001:1000] ^= 1  # as by an update with a small learning rate
    assert len({same, *(int(checksum(other)) for other in changed)}) == 5
    columns = tensor[:70_000].view(100, 700)
    assert int(checksum(columns.t())) == int(checksum(columns.t().contiguous())) != int(checksum(columns))


class Engine:
    """vLLM's ``AsyncLLM``, which writes down what it is asked."""

    errored = False

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __getattr__(self, name: str) -> Any:
        async def call(*args: Any, **options: Any) -> None:
            self.asked.append(name)

        return call

    async def add_request(self, name: str, prompt: Any, parameters: Any, *, priority: int) -> Any:
        assert parameters.ignore_eos and parameters.max_tokens == 4
        self.asked.append(f"request with priority {priority}")
        logprobs = SimpleNamespace(token_ids=(1,), logprobs=(0.0,))
        output = SimpleNamespace(token_ids=(1,), logprobs=logprobs, finish_reason="length", weight_versions=[])

        async def get() -> Any:
            return SimpleNamespace(outputs=[output])

        return SimpleNamespace(get=get)


@pytest.fixture
def engine() -> RolloutEngine:
    engine = RolloutEngine.__new__(RolloutEngine)
    engine._engine, engine._count = Engine(), 0
    engine._tokenizer = SimpleNamespace(decode=lambda *_, **__: "")
    return engine


def test_probes_are_queued_before_a_pause_ends(engine: RolloutEngine) -> None:
    request = OurRequest(prompt_token_ids=(1, 2), sampling=Sampling(max_tokens=4), seed=0)
    samples = asyncio.run(engine.resume([request, request]))
    assert len(samples) == 2 and FIRST < 0
    assert engine._engine.asked == [f"request with priority {FIRST}"] * 2 + ["resume_generation"]


def scheduled_behind_a_pause(folder: Path, policy: Any) -> list[str]:
    """Ids of the requests that vLLM's own scheduler takes up after a pause, with two slots, four requests and a probe."""
    options: Any = {"max_num_seqs": 2, "max_num_batched_tokens": 64, "max_model_len": 64, "is_encoder_decoder": False}
    config = VllmConfig(
        model_config=ModelConfig(model=str(folder), dtype="float32", max_model_len=64, skip_tokenizer_init=True),
        scheduler_config=SchedulerConfig(policy=policy, async_scheduling=False, **options),
        cache_config=CacheConfig(block_size=16),
    )
    config.cache_config.num_gpu_blocks = 100
    layer = FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=1, dtype=torch.float32)
    cache = KVCacheConfig(num_blocks=100, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], layer)])
    scheduler = Scheduler(config, cache, StructuredOutputManager(config), block_size=16)

    def add(name: str, arrival_time: float, priority: int) -> None:
        parameters = SamplingParams(max_tokens=8)
        options: Any = {"pooling_params": None, "arrival_time": arrival_time, "priority": priority}
        scheduler.add_request(Request(name, [1, 2, 3], parameters, **options))

    for i in range(4):
        add(f"request {i}", float(i), 0)
    assert list(scheduler.schedule().num_scheduled_tokens) == ["request 0", "request 1"]
    scheduler.reset_prefix_cache(reset_running_requests=True)  # what a pause with `clear_cache` does
    add("probe", 4.0, FIRST)
    return list(scheduler.schedule().num_scheduled_tokens)


def test_a_probe_comes_before_responses_under_way(tmp_path: Path) -> None:
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    Qwen2Config(**size, vocab_size=61, architectures=["Qwen2ForCausalLM"]).save_pretrained(tmp_path)
    assert scheduled_behind_a_pause(tmp_path, "priority") == ["probe", "request 0"]
    assert scheduled_behind_a_pause(tmp_path, "fcfs") == ["request 0", "request 1"]


def test_an_engine_ends_its_connection_before_the_next(engine: RolloutEngine) -> None:
    asyncio.run(engine.init_weight_transfer({}))
    assert engine._engine.asked == ["shutdown_weight_transfer_engine", "init_weight_transfer_engine"]


def test_a_policy_closes_its_connection_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    worker, asked = PolicyWorker.__new__(PolicyWorker), []
    worker._learner = worker._sender = None  # type: ignore[assignment]

    def connect(*_: Any, port: int, **options: Any) -> Any:
        asked.append(f"open {port}")
        return SimpleNamespace(close=lambda: asked.append(f"close {port}"))

    monkeypatch.setattr(weight_sender, "Sender", connect)
    for port in (1, 2):
        worker.open_weight_transfer(EngineClient({}, 1, 1.0), False, "", port)
    assert asked == ["open 1", "close 1", "open 2"]
