"""Logprobs and entropies of sampled tokens at the sampling temperature, computed without storing all logits.

The logits of n tokens over a vocabulary of V are by far the largest tensor of a pass: 4 n V bytes in float32, and several
times that with softmax and gradients. Here the tokens pass through the output layer in chunks of at most `LOGITS_BYTES`
of logits, and the backward pass computes each chunk again. On a GPU cut-cross-entropy's kernel (arXiv 2411.09009) can do
the same in tiles.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

LOGITS_BYTES = 256 * 2**20  # logits of one chunk in float32; a pass holds about three tensors of this size


def cap_of_logits(model: dict[str, Any]) -> float | None:
    """The cap that a model puts on its logits, from its configuration as transformers has it; None: there is none."""
    names = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma, RecurrentGemma, xLSTM
    return next((float(model[name]) for name in names if model.get(name) is not None), None)


def scale_of_logits(model: dict[str, Any]) -> float:
    """What a model multiplies its logits by."""
    divisor = model.get("logits_scaling") or 1.0  # Granite
    if str(model.get("model_type")).startswith("hyperclovax"):
        divisor = 1 / divisor
    return float(
        (model.get("logit_scale") or 1.0) * (model.get("lm_head_multiplier") or 1.0) / divisor
    )  # Cohere, Falcon-H1


class OutputHead(nn.Linear):
    """An output layer that returns logprobs. It is called once per pass, so ZeRO 3 gathers its weights once."""

    fused = False
    scale = 1.0  # the model multiplies its logits by it

    @staticmethod
    def of(causal_lm: Any, fused: bool = False) -> None:
        """Turns the output layer of a Hugging Face model into an `OutputHead`, in place; weights and names stay.

        Args:
            fused: use cut-cross-entropy's kernel in passes without entropies.

        Raises:
            TypeError: the layer is not a `torch.nn.Linear`, or it has a bias, which the kernel does not support; or the model
                caps its logits.
        """
        model = causal_lm.config.get_text_config().to_dict()
        if (cap := cap_of_logits(model)) is not None:
            raise TypeError(f"{type(causal_lm).__name__} caps its logits at {cap:g}; such models cannot be trained")
        head = causal_lm.get_output_embeddings()
        if type(head) is not nn.Linear:
            raise TypeError(
                f"the output layer of {type(causal_lm).__name__} is a {type(head).__name__}, but logprobs in chunks need "
                "torch.nn.Linear; models with another one cannot be trained"
            )
        if fused and head.bias is not None:
            raise TypeError(
                f"the output layer of {type(causal_lm).__name__} has a bias, which cut-cross-entropy does not support: set "
                "model.logprobs=chunked"
            )
        head.__class__ = OutputHead
        head.fused = fused
        head.scale = scale_of_logits(model)

    def forward(  # type: ignore[override]
        self, hidden: Tensor, token_ids: Tensor | None = None, temperature: float = 1.0, with_entropies: bool = False
    ) -> Any:
        """
        Args:
            hidden: (n, H) last hidden states.
            token_ids: (n,) int64 sampled tokens; None returns the logits, as a plain output layer does.
            temperature: sampling temperature, above 0; the same as that of vLLM's processed logprobs.

        Returns:
            Logprobs (n,), ``log softmax(logits / temperature)[token]``, and entropies (n,) in nats, both float32; the
            entropies are 0 unless ``with_entropies``.
        """
        if token_ids is None:
            return super().forward(hidden)
        temperature = temperature / self.scale
        if self.fused and not with_entropies and token_ids.numel():
            from cut_cross_entropy import linear_cross_entropy

            # filter_eps=None keeps all gradients; by default the kernel drops those too small for bfloat16.
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
        entropies = torch.zeros_like(logprobs)
        chunks = _chunks(len(hidden), weight)
        for part in chunks:
            log_p = _log_probabilities(hidden[part], weight, bias, temperature)
            logprobs[part] = log_p.gather(-1, token_ids[part, None]).squeeze(-1)
            if with_entropies:
                entropies[part] = -log_p.exp().mul_(log_p).sum(-1)
        # The backward pass of the head comes first, so a single chunk is kept at no cost in peak memory.
        kept = log_p if len(chunks) == 1 and any(ctx.needs_input_grad) else None
        ctx.save_for_backward(hidden, weight, bias, token_ids, entropies, kept)
        ctx.temperature, ctx.with_entropies = temperature, with_entropies
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """``d logprob / d logit_j = [j = token] - p_j`` and ``d H / d logit_j = -p_j (log p_j + H)``, p = softmax."""
        hidden, weight, bias, token_ids, entropies, kept = ctx.saved_tensors
        logprob_gradients, entropy_gradients = gradients
        grad_hidden = torch.empty_like(hidden)
        # Summed in float32: in bfloat16 a chunk's gradient would be rounded away beside a large sum.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        for part in _chunks(len(hidden), weight):
            log_p = _log_probabilities(hidden[part], weight, bias, ctx.temperature) if kept is None else kept
            slope = -logprob_gradients[part, None]
            gradient = log_p.exp()
            if ctx.with_entropies:
                weights = entropy_gradients[part, None]
                slope = torch.addcmul(slope - weights * entropies[part, None], weights, log_p, value=-1)
            gradient.mul_(slope).scatter_add_(-1, token_ids[part, None], logprob_gradients[part, None])
            gradient = _divided(gradient, ctx.temperature).to(weight.dtype)
            del log_p, slope
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


def _log_probabilities(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    """(n, V) float32."""
    return _divided(functional.linear(hidden, weight, bias).float(), temperature).log_softmax(-1)


def _divided(numbers: Tensor, temperature: float) -> Tensor:
    """``numbers / temperature``, in place; at 1 it saves a pass over the logits."""
    return numbers if temperature == 1.0 else numbers.div_(temperature)


def _chunks(num_tokens: int, weight: Tensor) -> list[slice]:
    size = max(1, LOGITS_BYTES // (4 * len(weight)))
    return [slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size)]
