"""Log-probabilities and entropies of sampled tokens, at the temperature they were sampled at, without all their logits.

The logits of n tokens over V words are by far the largest tensor of a pass, 4 n V bytes, and several times that with
softmax and gradients. Here at most LOGITS_BYTES of them exist at a time: the tokens go through the output layer in chunks,
forward, and again backward. On a GPU, cut-cross-entropy's kernel (arXiv 2411.09009) can take their place: it keeps the
logits of a tile in registers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

LOGITS_BYTES = 256 * 2**20  # of one chunk in float32; a pass holds about three such tensors


class OutputHead(nn.Linear):
    """A model's output layer that answers with logprobs, in one call, so that ZeRO 3 gathers its weights once."""

    fused: bool

    @staticmethod
    def of(causal_lm: Any, fused: bool = False) -> None:
        """Turns the output layer of a Hugging Face model into one, weights and name as they are.

        Args:
            fused: use cut-cross-entropy's kernel where no entropies are asked for.

        Raises:
            TypeError: the layer is not a plain matrix, or has a bias, which the kernel does not know.
        """
        head = causal_lm.get_output_embeddings()
        if type(head) is not nn.Linear:
            raise TypeError(
                f"the output layer of {type(causal_lm).__name__} is a {type(head).__name__}, but logprobs in chunks need "
                "torch.nn.Linear; models with another one cannot be trained"
            )
        if fused and head.bias is not None:
            raise TypeError(
                f"the output layer of {type(causal_lm).__name__} has a bias, which cut-cross-entropy does not know: set "
                "model.logprobs=chunked"
            )
        head.__class__ = OutputHead
        head.fused = fused

    def forward(  # type: ignore[override]
        self, hidden: Tensor, token_ids: Tensor | None = None, temperature: float = 1.0, with_entropies: bool = False
    ) -> Any:
        """
        Args:
            hidden: (n, H) last hidden states.
            token_ids: (n,) int64; None: the call of a plain output layer, which returns logits.
            temperature: of sampling, above 0. vLLM's processed logprobs are at the same temperature.

        Returns:
            ``log softmax(logits / temperature)[token]`` (n,) and the entropies (n,) in nats, 0 unless asked for; float32.
        """
        if token_ids is None:
            return super().forward(hidden)
        if self.fused and not with_entropies and token_ids.numel():
            from cut_cross_entropy import linear_cross_entropy

            # No gradient is left out (filter_eps): the kernel would drop those that bfloat16 cannot add to a mean.
            nll = linear_cross_entropy(hidden / temperature, self.weight, token_ids, reduction="none", filter_eps=None)
            return -nll.float(), torch.zeros_like(nll, dtype=torch.float32)
        return _ChunkedLogprobs.apply(hidden, self.weight, self.bias, token_ids, temperature, with_entropies)


class _ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        token_ids: Tensor,
        temperature: float,
        with_entropies: bool,
    ) -> tuple[Tensor, Tensor]:
        logprobs = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        entropies, normalizers = torch.zeros_like(logprobs), torch.empty_like(logprobs)
        for part in _chunks(len(hidden), weight):
            logits = _logits(hidden[part], weight, bias, temperature)
            normalizers[part] = logits.logsumexp(-1)
            logprobs[part] = logits.gather(-1, token_ids[part, None]).squeeze(-1) - normalizers[part]
            if with_entropies:  # log Z - E[logit]
                probabilities = (logits - normalizers[part, None]).exp_()
                entropies[part] = normalizers[part] - probabilities.mul_(logits).sum(-1)
            del logits
        ctx.save_for_backward(hidden, weight, bias, token_ids, normalizers, entropies)
        ctx.temperature, ctx.with_entropies = temperature, with_entropies
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """``d logprob / d logit_j = [j = token] - p_j`` and ``d H / d logit_j = -p_j (log p_j + H)``, p the probabilities."""
        hidden, weight, bias, token_ids, normalizers, entropies = ctx.saved_tensors
        of_logprobs, of_entropies = gradients
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        # Chunks add up in float32: in bfloat16 each addition would lose what is small beside the sum.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias else None
        for part in _chunks(len(hidden), weight):
            logits = _logits(hidden[part], weight, bias, ctx.temperature)
            logits -= normalizers[part, None]  # log p
            probabilities = logits.exp()
            slope = of_logprobs[part, None]
            if ctx.with_entropies:
                slope = slope + of_entropies[part, None] * logits.add_(entropies[part, None])
            gradient = probabilities.mul_(slope).neg_()
            gradient.scatter_add_(-1, token_ids[part, None], of_logprobs[part, None])
            gradient = gradient.div_(ctx.temperature).to(weight.dtype)
            del logits, slope
            if grad_hidden is not None:
                grad_hidden[part] = gradient @ weight
            if grad_weight is not None:
                grad_weight += gradient.T @ hidden[part]
            if grad_bias is not None:
                grad_bias += gradient.sum(0)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
        )


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    """(n, V) float32, over the temperature."""
    return functional.linear(hidden, weight, bias).float() / temperature


def _chunks(num_tokens: int, weight: Tensor) -> list[slice]:
    size = max(1, LOGITS_BYTES // (4 * len(weight)))
    return [slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size)]
