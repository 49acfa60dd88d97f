"""vLLM's engines for weight transfers in threads of one process, with what needs a GPU replaced.

Ranks of the policy and worker processes of engines are threads. A gather is a collective of the policy's ranks. A broadcast
is one of rank 0 and all engines: it returns at once on rank 0, as on a GPU, and rank 0 waits where it waits for its
stream. What a gather returns is overwritten when the next one begins, as ZeRO 3 frees it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vllm.distributed.weight_transfer import ipc_engine, nccl_engine, packed_tensor

from sae_rl.backends import weight_sender
from sae_rl.backends.weight_receiver import WorkerExtension
from sae_rl.backends.weight_sender import BucketSender, Sender
from sae_rl.backends.weight_transfer import TransferFailed, numbers

PATIENCE_S = 20.0


class Model(nn.Module):
    """Takes weights as vLLM's models do."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: dict[str, Tensor] = {}

    def load_weights(self, weights: list[tuple[str, Tensor]]) -> None:
        self.loaded |= {name: tensor.clone() for name, tensor in weights}


class Worker(WorkerExtension):
    """A worker process of an engine, as far as it receives weights."""

    def __init__(self, engine: Any, config: Any) -> None:
        self.model = Model()
        self.weight_transfer_engine = engine(None, config, torch.device("cpu", 0), self.model)

    def receive(self, update_info: dict[str, Any]) -> None:
        engine = self.weight_transfer_engine
        engine.receive_weights(engine.parse_update_info(update_info))

    @property
    def received(self) -> dict[str, int]:
        return numbers(self._received)


class World:
    """Policy ranks and engines that send weights to each other.

    Args:
        tensors: the policy's weights.
        fails_at: the call of ``update_weights`` during which the first engine is lost; None: no engine is lost.
        loses: the broadcast whose bytes do not arrive.
    """

    def __init__(
        self,
        tensors: dict[str, Tensor],
        monkeypatch: pytest.MonkeyPatch,
        *,
        num_ranks: int = 2,
        num_engines: int = 2,
        fails_at: int | None = None,
        loses: int | None = None,
    ) -> None:
        self.tensors, self.num_ranks, self.num_engines = tensors, num_ranks, num_engines
        self.fails_at, self.loses = fails_at, loses
        self.events: list[list[str]] = [[] for _ in range(num_ranks)]
        self.policy, self.transfer = threading.Barrier(num_ranks), threading.Barrier(1 + num_engines)
        self.gathered: list[Any] = [None] * num_ranks
        self.sent: Tensor | None = None  # by a broadcast that rank 0 has not waited for
        self.is_blocked = threading.Event()  # rank 0 waits for engines
        self.num_updates = self.num_broadcasts = self.num_destroyed = 0
        self.rank = threading.local()
        self.workers: list[Worker] = []
        streams = [SimpleNamespace(synchronize=lambda: None)] * 2
        monkeypatch.setattr(packed_tensor, "_get_streams", lambda *_: streams)
        monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: self.event("synchronize"))
        monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
        monkeypatch.setattr(weight_sender, "own_stream", contextlib.nullcontext)
        monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", lambda _: self)
        monkeypatch.setattr(nccl_engine, "worker_init_process_group", lambda info, _: Received(self))
        monkeypatch.setattr(BucketSender, "_post_send_sync", lambda _: self.wait())

    # The policy's side

    def event(self, what: str) -> None:
        self.events[self.rank.index].append(what)

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.tensors.items():
            self.event(f"gather {name}")
            self.policy.wait(PATIENCE_S)
            gathered = tensor.clone()
            yield f"causal_lm.{name}", gathered
            gathered.zero_()

    def broadcast(self, tensor: Tensor, src: int, stream: Any = None) -> None:
        self.event(f"broadcast {tensor.numel()}")
        self.num_broadcasts += 1
        self.sent = torch.zeros_like(tensor) if self.loses == self.num_broadcasts else tensor

    def wait(self) -> None:
        self.event("wait")
        if self.rank.index == 0 and self.sent is not None:
            self.is_blocked.set()
            with contextlib.suppress(threading.BrokenBarrierError):  # NCCL's kernels end when they are aborted
                self.transfer.wait()
                self.transfer.wait()
            self.sent = None

    def destroy(self) -> None:
        self.num_destroyed += 1
        self.transfer.abort()

    def learner(self, rank: int) -> Any:
        embedding = nn.Embedding(1, 1)
        causal_lm = nn.Module()
        causal_lm.embed = embedding
        causal_lm.get_input_embeddings = lambda: embedding
        causal_lm.config = SimpleNamespace(tie_word_embeddings=False)
        return SimpleNamespace(
            rank=SimpleNamespace(index=rank, device="cuda"),
            network=SimpleNamespace(causal_lm=causal_lm),
            full_weights=self.full_weights,
            weight_shapes=lambda: [(f"causal_lm.{n}", t.dtype, tuple(t.shape)) for n, t in self.tensors.items()],
        )

    # The engines' side: what `EngineClient` does

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        engine = (
            nccl_engine.NCCLWeightTransferEngine if "rank_offset" in init_info else ipc_engine.IPCWeightTransferEngine
        )
        config: Any = SimpleNamespace(parallel_config=None, model_config=None)
        self.workers = [Worker(engine, config) for _ in range(self.num_engines)]
        for worker in self.workers:
            transfer = worker.weight_transfer_engine
            transfer.init_transfer_engine(transfer.parse_init_info(init_info))

    def start_weight_update(self) -> None:
        for worker in self.workers:
            worker.watch_weights()

    def update_weights(self, update_info: Any) -> None:
        self.num_updates += 1
        if self.num_updates == self.fails_at:
            assert self.is_blocked.wait(PATIENCE_S)
            raise TransferFailed("rollout engine 0 did not receive weights: it died")
        with ThreadPoolExecutor(self.num_engines) as threads:
            list(threads.map(lambda worker: worker.receive(update_info), self.workers))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        pass

    def send(self, *, shares_gpus: bool = False) -> list[Any]:
        """One transfer on all ranks. Returns what `Sender.send` returned on each, or its error."""

        def on_rank(index: int) -> Any:
            self.rank.index = index
            options: dict[str, Any] = {"shares_gpus": shares_gpus, "address": "", "port": 0, "timeout_s": PATIENCE_S}
            client: Any = self
            sender = Sender(self.learner(index), client, world_size=1 + self.num_engines, **options)
            try:
                return sender.send()
            except TransferFailed as error:
                return error

        with ThreadPoolExecutor(self.num_ranks) as threads:
            return list(threads.map(on_rank, range(self.num_ranks), timeout=PATIENCE_S))


class Received:
    """The communicator of an engine's worker process."""

    def __init__(self, world: World) -> None:
        self._world = world

    def broadcast(self, tensor: Tensor, src: int, stream: Any = None) -> None:
        self._world.transfer.wait(PATIENCE_S)
        sent = self._world.sent
        assert sent is not None and sent.numel() == tensor.numel(), "both sides cut the same buckets"
        tensor.copy_(sent)
        self._world.transfer.wait(PATIENCE_S)


class Shim:
    """A module of torch, with some names replaced."""

    def __init__(self, module: Any, **replaced: Any) -> None:
        self._module = module
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def replace_cuda_ipc(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Handles of CUDA IPC become tensors of this process, and each rank's default group that of the world."""
    buffers: dict[int, Tensor] = {}
    world.is_blocked.set()  # rank 0 calls the engines itself

    def export(tensor: Tensor) -> tuple[Any, tuple[Any, ...]]:
        buffers[id(tensor)] = tensor
        return None, (*"012345", 0, id(tensor))

    def all_gather_object(out: list[Any], mine: Any) -> None:
        world.gathered[world.rank.index] = mine
        world.policy.wait(PATIENCE_S)
        out[:] = world.gathered

    def empty(*shape: Any, device: Any = None, **options: Any) -> Tensor:
        return torch.empty(*shape, **options)

    def barrier() -> None:
        world.event("barrier")
        world.policy.wait(PATIENCE_S)

    nothing: Callable[..., Any] = lambda *_: SimpleNamespace(synchronize=lambda: None)  # noqa: E731
    gpu = SimpleNamespace(uuid="gpu")
    cuda = Shim(
        torch.cuda,
        current_stream=nothing,
        synchronize=nothing,
        ipc_collect=nothing,
        get_device_properties=lambda _: gpu,
    )
    group = Shim(
        torch.distributed,
        is_initialized=lambda: True,
        get_world_size=lambda: world.num_ranks,
        all_gather_object=all_gather_object,
        barrier=barrier,
    )
    for module in (packed_tensor, ipc_engine):
        monkeypatch.setattr(module, "reduce_tensor", export)
        monkeypatch.setattr(module, "torch", Shim(torch, cuda=cuda, distributed=group, empty=empty))
    monkeypatch.setattr("torch.multiprocessing.reductions.rebuild_cuda_tensor", lambda *args: buffers[args[7]])
