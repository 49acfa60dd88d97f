"""Log-probabilities and entropies of sampled tokens, at the temperature they were sampled at."""

import torch
from torch import Tensor


def token_logprobs(logits: Tensor, token_ids: Tensor, temperature: float) -> Tensor:
    """``log softmax(logits / temperature)[token]`` in float32.

    Args:
        logits: (n, V), of any float type.
        token_ids: (n,) int64.
        temperature: the sampling temperature, > 0. vLLM's processed logprobs are at the same temperature.

    Returns:
        (n,) float32.
    """
    scaled = logits.float() / temperature
    chosen = scaled.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    return chosen - torch.logsumexp(scaled, dim=-1)


def token_entropies(logits: Tensor, temperature: float) -> Tensor:
    """(n, V) -> (n,) entropy in nats of ``softmax(logits / temperature)``, float32."""
    logprobs = torch.log_softmax(logits.float() / temperature, dim=-1)
    return -(logprobs.exp() * logprobs).sum(-1)
