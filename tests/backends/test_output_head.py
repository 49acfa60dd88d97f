"""Logprobs in chunks equal those from all logits, and so do their gradients; no more logits than a chunk exist at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from sae_rl.backends import logprobs
from sae_rl.backends.logprobs import OutputHead
from tests.interpreter import in_tritons_interpreter

VOCABULARY, WIDTH = 37, 8


def make_head(bias: bool, dtype: torch.dtype = torch.float64) -> OutputHead:
    return OutputHead(WIDTH, VOCABULARY, bias=bias, dtype=dtype)


def from_all_logits(head: OutputHead, hidden: Tensor, token_ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    every = torch.log_softmax(nn.functional.linear(hidden, head.weight, head.bias).float() / temperature, -1)
    return every.gather(-1, token_ids[:, None])[:, 0], -(every.exp() * every).sum(-1)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    num_tokens=st.integers(0, 23),
    chunk=st.integers(1, 30),
    temperature=st.floats(0.2, 3),
    bias=st.booleans(),
    with_entropies=st.booleans(),
    frozen=st.booleans(),
)
def test_values_and_gradients_are_those_of_all_logits(
    monkeypatch: pytest.MonkeyPatch,
    num_tokens: int,
    chunk: int,
    temperature: float,
    bias: bool,
    with_entropies: bool,
    frozen: bool,
) -> None:
    monkeypatch.setattr(logprobs, "LOGITS_BYTES", 4 * VOCABULARY * chunk)
    torch.manual_seed(num_tokens)
    head = make_head(bias, torch.float32).requires_grad_(not frozen)
    token_ids = torch.randint(0, VOCABULARY, (num_tokens,))
    inputs = [torch.randn(num_tokens, WIDTH).requires_grad_() for _ in range(2)]
    inputs[1].data.copy_(inputs[0].data)
    weights = torch.randn(2, num_tokens)
    gradients = []
    answers = []
    for hidden, call in zip(inputs, (head, None), strict=True):
        if call is not None:
            found = call(hidden, token_ids, temperature, with_entropies)
        else:
            found = from_all_logits(head, hidden, token_ids, temperature)
        loss = (found[0] * weights[0]).sum() + (found[1] * weights[1]).sum() * with_entropies
        head.zero_grad()
        loss.backward()
        answers.append(found)
        gradients.append([hidden.grad, *(p.grad for p in head.parameters())])
    torch.testing.assert_close(answers[0][0], answers[1][0], atol=1e-5, rtol=1e-5)
    if with_entropies:
        torch.testing.assert_close(answers[0][1], answers[1][1], atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours is None) == (theirs is None) == (frozen and ours is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def test_no_more_logits_than_a_chunk_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "LOGITS_BYTES", 4 * VOCABULARY * 5)
    sizes: list[int] = []
    plain = logprobs._log_probabilities
    monkeypatch.setattr(
        logprobs, "_log_probabilities", lambda hidden, *rest: sizes.append(len(hidden)) or plain(hidden, *rest)
    )
    head = make_head(False, torch.float32)
    head(torch.randn(12, WIDTH).requires_grad_(), torch.zeros(12, dtype=torch.int64))[0].sum().backward()
    assert sizes == [5, 5, 2] * 2, "forward and backward"


def test_gradients_of_many_chunks_add_up_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Summing 4,000 gradients one by one in bfloat16 would add up their rounding errors."""
    torch.manual_seed(0)
    head = make_head(False, torch.bfloat16)
    hidden = torch.ones(4000, WIDTH, dtype=torch.bfloat16)
    token_ids = torch.zeros(4000, dtype=torch.int64)
    found = []
    for chunk in (4000, 1):
        monkeypatch.setattr(logprobs, "LOGITS_BYTES", 4 * VOCABULARY * chunk)
        head.zero_grad()
        head(hidden, token_ids)[0].sum().backward()
        assert head.weight.grad is not None
        found.append(head.weight.grad.float())
    torch.testing.assert_close(found[1], found[0], rtol=0.01, atol=1e-6)


def test_extreme_logits_stay_finite() -> None:
    head = make_head(False, torch.float32)
    with torch.no_grad():
        head.weight.zero_()
        head.weight[3] = 1e4
    hidden = torch.ones(2, WIDTH).requires_grad_()
    found, entropies = head(hidden, torch.tensor([3, 0]), 1.0, True)
    assert found.tolist() == [0.0, -1e4 * WIDTH] and entropies.tolist() == [0.0, 0.0]
    (found.sum() + entropies.sum()).backward()
    assert hidden.grad is not None and bool(hidden.grad.isfinite().all())


def test_it_is_still_the_models_output_layer() -> None:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    names, logits = list(model.state_dict()), model(torch.tensor([[1, 2, 3]])).logits
    OutputHead.of(model)
    assert list(model.state_dict()) == names
    assert torch.equal(model(torch.tensor([[1, 2, 3]])).logits, logits)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(TypeError, match="the output layer of LlamaForCausalLM is a Sequential"):
        OutputHead.of(model)


def test_the_fused_kernel_in_tritons_interpreter() -> None:
    pytest.importorskip("cut_cross_entropy", reason="cut-cross-entropy is not installed")
    in_tritons_interpreter(interpret)


def interpret() -> None:
    """Runs in float16: the kernel's gradients do not support float32, and the interpreter does not support bfloat16."""
    import triton.language as tl
    from triton.language.extra import libdevice

    libdevice.log1p = lambda x: tl.log(x + 1.0)  # missing in the interpreter
    torch.cuda.get_device_capability = lambda _=None: (9, 0)  # type: ignore[assignment]
    torch.cuda.current_device = lambda: 0
    torch.manual_seed(0)
    head = make_head(bias=False, dtype=torch.float16)
    token_ids, weights = torch.randint(0, VOCABULARY, (11,)), torch.randn(11)
    given = torch.randn(11, WIDTH, dtype=torch.float16)
    answers = []
    for fused in (True, False):
        head.fused, head.weight.grad = fused, None
        hidden = given.clone().requires_grad_()
        logprobs, entropies = head(hidden, token_ids, 0.7)
        assert logprobs.dtype == torch.float32 and not bool(entropies.any())
        (logprobs * weights).sum().backward()
        assert hidden.grad is not None and head.weight.grad is not None
        answers.append((logprobs.detach(), hidden.grad, head.weight.grad))
    for found, expected in zip(*answers, strict=True):
        assert float(expected.abs().max()) > 0.1
        torch.testing.assert_close(found, expected, atol=5e-3, rtol=5e-3)
    assert head(given[:0], token_ids[:0], 0.7)[0].shape == (0,)


def test_the_fused_kernel_does_not_support_a_bias() -> None:
    class Model(nn.Module):
        config = LlamaConfig()

        def get_output_embeddings(self) -> nn.Module:
            return nn.Linear(2, 3)

    with pytest.raises(TypeError, match=r"has a bias.*model.logprobs=chunked"):
        OutputHead.of(Model(), fused=True)


def test_capped_logits_are_refused() -> None:
    size = {
        "vocab_size": 11,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    model = Gemma2ForCausalLM(Gemma2Config(**size, head_dim=4, num_key_value_heads=1, final_logit_softcapping=30.0))
    with pytest.raises(TypeError, match="Gemma2ForCausalLM caps its logits at 30; such models cannot be trained"):
        OutputHead.of(model)


@pytest.mark.parametrize(
    ("model", "scale", "cap"),
    [
        ({"logits_scaling": 4.0}, 0.25, None),
        ({"model_type": "hyperclovax", "logits_scaling": 4.0}, 4.0, None),
        ({"logit_scale": 0.0625}, 0.0625, None),
        ({"lm_head_multiplier": 0.5, "logit_scale": None}, 0.5, None),
        ({"logits_soft_cap": 30}, 1.0, 30.0),
        ({"output_logit_soft_cap": 20.0}, 1.0, 20.0),
        ({"final_logit_softcapping": None}, 1.0, None),
    ],
)
def test_how_models_of_transformers_change_their_logits(model: dict[str, Any], scale: float, cap: float | None) -> None:
    assert (logprobs.scale_of_logits(model), logprobs.cap_of_logits(model)) == (scale, cap)
