"""One update of policy and critic by hand: transformers' padded models, PPO's losses written out, torch's gradients."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from sae_rl.types import Batch, Scores, Targets

CLIP, ENTROPY_COEF, VALUE_CLIP = 0.2, 0.01, 0.3


@dataclass(frozen=True)
class Expected:
    """The inputs of an update, and its expected results."""

    given: Scores
    targets: Targets
    logprobs: Tensor  # (N,), and so are the next two; 0 at tokens that were not sampled
    entropies: Tensor
    values: Tensor
    metrics: dict[str, float]
    weights: dict[str, Tensor]  # "policy ..." and "critic ...", by the learners' names
    gradients: dict[str, Tensor]


def padded(batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(B, width) ids and mask; and the row of each sampled token, and the position before it."""
    rows, at_row, at_state = [], [], []
    for i in range(batch.num_responses):
        prompt = batch.prompt_token_ids[batch.prompt_offsets[i] : batch.prompt_offsets[i + 1]]
        start, end = int(batch.offsets[i]), int(batch.offsets[i + 1])
        rows.append(torch.cat([prompt, batch.token_ids[start:end]]))
        for t in range(start, end):
            if batch.action_mask is None or batch.action_mask[t]:
                at_row.append(i)
                at_state.append(len(prompt) + t - start - 1)
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return ids, torch.arange(ids.shape[1]) < lengths[:, None], torch.tensor(at_row), torch.tensor(at_state)


def flat(sampled: Tensor, batch: Batch) -> Tensor:
    """One number per sampled token -> (N,), with 0 at the other tokens."""
    everywhere = torch.zeros(batch.num_tokens)
    everywhere[torch.ones_like(everywhere, dtype=torch.bool) if batch.action_mask is None else batch.action_mask] = (
        sampled
    )
    return everywhere


def expected_of(policy_folder: Path, critic_folder: Path, batch: Batch) -> Expected:
    policy = AutoModelForCausalLM.from_pretrained(policy_folder, attn_implementation="eager")
    critic = AutoModelForTokenClassification.from_pretrained(critic_folder, attn_implementation="eager").eval()
    ids, mask, row, state = padded(batch)
    every = torch.log_softmax(policy(input_ids=ids, attention_mask=mask.long()).logits / batch.temperature, -1)[
        row, state
    ]
    logprobs = every.gather(1, ids[row, state + 1][:, None])[:, 0]
    entropies = -(every.exp() * every).sum(-1)
    values = critic(input_ids=ids, attention_mask=mask.long()).logits[row, state, 0]

    draw = torch.Generator().manual_seed(7)
    count = len(row)
    old_logprobs = logprobs.detach() + 0.3 * torch.randn(count, generator=draw)
    old_values = values.detach() + 0.5 * torch.randn(count, generator=draw)
    advantages, returns = (torch.randn(count, generator=draw) for _ in range(2))

    ratio = (logprobs - old_logprobs).exp()
    surrogate = torch.minimum(ratio * advantages, ratio.clip(1 - CLIP, 1 + CLIP) * advantages)
    policy_loss = (-surrogate - ENTROPY_COEF * entropies).sum() / count
    near = old_values + (values - old_values).clip(-VALUE_CLIP, VALUE_CLIP)
    critic_loss = torch.maximum((values - returns) ** 2 / 2, (near - returns) ** 2 / 2).sum() / count
    policy_loss.backward()
    critic_loss.backward()
    networks = {"policy": policy, "critic": critic}
    named = {f"{role} {_name(role, n)}": p for role, network in networks.items() for n, p in network.named_parameters()}
    norms = {
        f"{role}/grad_norm": float(torch.cat([p.grad.flatten() for p in network.parameters()]).norm())
        for role, network in networks.items()
    }
    return Expected(
        given=Scores(old_logprobs=flat(old_logprobs, batch), values=flat(old_values, batch), ref_logprobs=None),
        targets=Targets(advantages=flat(advantages, batch), returns=flat(returns, batch)),
        logprobs=flat(logprobs.detach(), batch),
        entropies=flat(entropies.detach(), batch),
        values=flat(values.detach(), batch),
        metrics={"policy/loss": policy_loss.item(), "critic/loss": critic_loss.item(), **norms},
        weights={name: parameter.detach() for name, parameter in named.items()},
        gradients={name: parameter.grad for name, parameter in named.items() if parameter.grad is not None},
    )


def _name(role: str, name: str) -> str:
    if role == "policy":
        return f"causal_lm.{name}"
    part, _, rest = name.partition(".")
    return f"{ {'model': 'backbone', 'score': 'value_head'}[part] }.{rest}"
