"""Sends the policy's weights to the rollout engines, for ZeRO stages 0 to 3.

    workers/weight_sync.py -> workers/policy.py -> `Sender` -> transfer engine -> worker processes of each rollout engine

The transfer engine implements vLLM's API:

    CPU                                  `GlooSender`, received by `weight_receiver.GlooReceiver`
    GPUs                                 `BucketSender`, received by vLLM's NCCL engine
    GPUs shared with rollout engines     vLLM's CUDA IPC engine on both sides

It reads the weights from the `Sender`, and calls the rollout engines through `workers.engine_client.EngineClient`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import ParamMeta, VLLMWeightSyncClient, WeightSource
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo, IPCTrainerWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_common import worker_init_payload
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine

from sae_rl.backends.deepspeed import Learner
from sae_rl.backends.weight_receiver import GLOO, GlooCommunicator, GlooInitInfo
from sae_rl.backends.weight_transfer import BUCKET_BYTES, TransferFailed, as_bytes, buckets, checksum, numbers

ABORT_S = 5.0  # the longest wait for the call of a broadcast before its communicator is aborted


class Sender(WeightSource):
    """The policy's connection to some rollout engines. The transfer engine reads the weights from it, one by one.

    All ranks have one, since gathering ZeRO-3 weights is a collective. Weights have their Hugging Face names. Tied
    embeddings are sent under two names: on a CPU vLLM has an output layer of its own, which would keep old weights.
    """

    def __init__(
        self,
        learner: Learner,
        client: VLLMWeightSyncClient,
        *,
        shares_gpus: bool,
        address: str,
        port: int,
        world_size: int,
        timeout_s: float,
    ) -> None:
        """
        Args:
            shares_gpus: rollout engines run on the learners' GPUs.
            address, port: of the policy's rank 0, where the process group meets.
            world_size: 1 for the sender plus the worker processes of all engines.
        """
        self._learner = learner
        self._pending: Iterator[tuple[str, Tensor]] = iter(())
        self._checksums: list[tuple[str, Tensor]] = []
        causal_lm: Any = learner.network.causal_lm
        names = {id(p): name for name, p in causal_lm.named_parameters()}
        embeddings = names[id(causal_lm.get_input_embeddings().weight)]
        self._tied_name = embeddings if causal_lm.config.tie_word_embeddings else None
        rank = learner.rank.index
        # vLLM's IPC buffer must hold the largest tensor, which may be the embedding of more than 1 GiB.
        largest = max(torch.Size(meta.shape).numel() * meta.dtype.itemsize for meta in self.metadata())
        wire = {"rank": rank, "packed_buffer_size_bytes": max(BUCKET_BYTES, largest)}
        self._engine: Any
        if shares_gpus:
            self._engine = IPCTrainerWeightTransferEngine.trainer_init(
                IPCTrainerInitInfo(packed=True, **wire), client=FailsLate(client), source=self
            )
        elif learner.rank.device == "cpu":
            gloo = GlooTrainerInitInfo(address, port, world_size, timeout_s=timeout_s, **wire)
            self._engine = GlooSender.trainer_init(gloo, client=client, source=self)
        else:
            nccl = NCCLTrainerInitInfo(address, port, world_size, **wire)
            with own_stream():
                self._engine = BucketSender.trainer_init(nccl, client=client, source=self)

    def send(self) -> dict[str, int]:
        """Sends the policy's current weights.

        Returns:
            The checksum of each tensor by the name that it was sent under; empty on ranks other than 0.

        Raises:
            TransferFailed: an engine failed or was late.
        """
        self._pending, self._checksums = self._learner.full_weights(), []
        if self._learner.rank.device == "cuda":
            torch.cuda.synchronize()  # the optimizer may work on streams of its own
        try:
            self._engine.send_weights()
            if isinstance(self._engine.client, FailsLate):
                self._engine.client.check()
        finally:
            # If an engine died, some weights remain. This rank gathers them too, since the other ranks do.
            for _ in self._pending:
                pass
        return numbers(self._checksums)

    def close(self) -> None:
        """Ends the connection, also if an engine that it leads to is gone."""
        self._engine.shutdown()

    def metadata(self) -> list[ParamMeta]:
        """Name, type and shape of every tensor that iteration yields, in the same order."""
        shapes = self._learner.weight_shapes()
        return [ParamMeta(sent, dtype, shape) for name, dtype, shape in shapes for sent in self._sent_names(name)]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._pending:
            for sent_name in self._sent_names(name):
                if self._learner.rank.index == 0:
                    self._checksums.append((sent_name, checksum(tensor)))
                yield sent_name, tensor

    def _sent_names(self, name: str) -> list[str]:
        name = name.removeprefix("causal_lm.")
        return [name, "lm_head.weight"] if name == self._tied_name else [name]


@contextlib.contextmanager
def own_stream() -> Iterator[None]:
    """Restores the current stream, which vLLM replaces for the whole thread when it opens a communicator."""
    with torch.cuda.stream(torch.cuda.current_stream()):
        yield


class FailsLate:
    """Keeps the first failure of an engine for the end of the transfer, and makes no more calls.

    vLLM's CUDA IPC engine has barriers between its calls. Rank 0 must reach them, or the other ranks would wait forever.
    """

    def __init__(self, client: VLLMWeightSyncClient) -> None:
        self._client = client
        self._failure: TransferFailed | None = None

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._client.init_weight_transfer_engine(init_info)

    def start_weight_update(self) -> None:
        self._call("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self._call("update_weights", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._call("finish_weight_update", weight_version)

    def check(self) -> None:
        """Raises the failure, if there was one."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _call(self, name: str, *arguments: Any) -> None:
        if self._failure is None:
            try:
                getattr(self._client, name)(*arguments)
            except TransferFailed as failure:
                self._failure = failure


class BucketSender(NCCLTrainerWeightTransferEngine):
    """The policy's side of vLLM's NCCL engine. Ranks gather a whole bucket before rank 0 sends it.

    vLLM's own sender gathers on side streams, between broadcasts of another communicator, while other ranks run ahead.
    NCCL may then wait forever, and nothing orders those streams behind the optimizer's. Here all work is in the current
    stream's order, and each rank waits until it is done.
    """

    _failed = False  # an engine failed, so nothing more is sent

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._calling = threading.Lock()  # held during the call of a broadcast
        self.client = AbortsOnFailure(self.client, self._abort)

    def _broadcast(self, source: WeightSource, meta: list[ParamMeta]) -> None:
        """Called by `send_weights`, on rank 0 while the engines receive."""
        weights = self._checked_iter(source, meta)
        sizes = [torch.Size(one.shape).numel() * one.dtype.itemsize for one in meta]
        for bucket in buckets(sizes, self.packed_buffer_size_bytes):
            packed: Tensor | None = None
            at = 0
            for i in bucket:
                _, tensor = next(weights)  # under ZeRO 3 a collective, whose result is freed by the next one
                if self.is_sender:
                    if packed is None:
                        packed = torch.empty(sum(sizes[j] for j in bucket), dtype=torch.uint8, device=tensor.device)
                    packed[at : at + sizes[i]].copy_(as_bytes(tensor))
                    at += sizes[i]
            self._post_send_sync()  # waits for the current stream
            if packed is not None:
                self._send_bucket(packed)
                self._post_send_sync()
        next(weights, None)  # raises ValueError if the source yields more weights than its metadata lists

    def _send_bucket(self, packed: Tensor) -> None:
        with self._calling:
            if not self._failed:
                stream = torch.cuda.current_stream() if packed.is_cuda else None
                self.model_update_group.broadcast(packed, src=0, stream=stream)

    def _abort(self) -> None:
        """Ends a broadcast that waits for an engine which will not take part; called in another thread."""
        self._failed = True
        called = self._calling.acquire(timeout=ABORT_S)  # NCCL may wait inside the call itself
        try:
            self.shutdown()
        finally:
            if called:
                self._calling.release()


class AbortsOnFailure:
    """A client that calls ``abort`` when engines fail to receive, since rank 0 would wait for them in a broadcast."""

    def __init__(self, client: VLLMWeightSyncClient, abort: Any) -> None:
        self._client, self._abort = client, abort

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def update_weights(self, update_info: Any) -> None:
        try:
            self._client.update_weights(update_info)
        except TransferFailed:
            self._abort()
            raise


@dataclass
class GlooTrainerInitInfo(NCCLTrainerInitInfo):
    """Where the policy's rank 0 opens the process group of `GlooSender`."""

    backend: ClassVar[str] = GLOO

    timeout_s: float = field(kw_only=True)


class GlooSender(BucketSender):
    """`BucketSender` with gloo in place of NCCL."""

    init_info_cls = GlooTrainerInitInfo

    @classmethod
    def trainer_init(
        cls, init_info: GlooTrainerInitInfo, *, client: VLLMWeightSyncClient, source: WeightSource | None = None
    ) -> GlooSender:
        """Opens the connection."""
        wire = init_info.packed_buffer_size_bytes
        sender = cls(client=client, source=source, is_sender=init_info.is_sender, packed_buffer_size_bytes=wire)
        if init_info.is_sender:
            info = GlooInitInfo(
                master_address=init_info.master_address,
                master_port=init_info.master_port,
                rank_offset=1,
                world_size=init_info.world_size,
                packed_buffer_size_bytes=wire,
                timeout_s=init_info.timeout_s,
            )
            # Joining blocks until both sides have joined, so the receivers are called in a thread.
            with ThreadPoolExecutor(max_workers=1) as thread:
                receivers = thread.submit(client.init_weight_transfer_engine, worker_init_payload(info))
                sender.model_update_group = GlooCommunicator(info, rank=0)
                receivers.result()
        return sender
