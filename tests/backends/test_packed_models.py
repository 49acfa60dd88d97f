"""Packed rows give the results of transformers' padded models, for every architecture, up to rounding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma2Config, GraniteConfig, LlamaConfig, Qwen2Config, Qwen3Config

from sae_rl.backends import attention
from sae_rl.backends.flops import PassCost
from sae_rl.backends.models import CriticNetwork, PolicyNetwork, load_causal_lm
from sae_rl.backends.packing import Prompts, build_micro_batch
from sae_rl.config.schema import ModelConfig
from sae_rl.tasks.tokenizer import build_tokenizer
from sae_rl.types import Batch, offsets_of
from tests.backends.flash_on_cpu import Kernels, flash_on_cpu
from tests.exactness import Exactness, largest_difference

VOCABULARY, TEMPERATURE = 61, 0.8
SIZE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
ARCHITECTURES = {
    "qwen2": Qwen2Config(**SIZE, tie_word_embeddings=False),
    "qwen2 tied": Qwen2Config(**SIZE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZE, head_dim=16, tie_word_embeddings=True),
    "llama": LlamaConfig(**SIZE, tie_word_embeddings=False),
    # The first layer sees all tokens, the second a window of six.
    "qwen2 with a window": Qwen2Config(**SIZE, use_sliding_window=True, sliding_window=6, max_window_layers=1),
}
LENGTHS = [(3, 5), (2, 1), (4, 17), (1, 9), (3, 5)]  # prompt and response; the first and the last prompt are equal


@pytest.fixture(scope="module", params=ARCHITECTURES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    model = AutoModelForCausalLM.from_config(ARCHITECTURES[request.param])
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)  # predictions far from uniform reveal a leak between sequences
    model.save_pretrained(path)
    return path


@pytest.fixture
def batch() -> Batch:
    draw = torch.Generator().manual_seed(1)
    num_prompt, num_response = (sum(column) for column in zip(*LENGTHS, strict=True))
    prompt_token_ids = torch.randint(0, VOCABULARY, (num_prompt,), generator=draw)
    prompt_token_ids[-3:] = prompt_token_ids[:3]
    return Batch(
        prompt_token_ids=prompt_token_ids,
        prompt_offsets=offsets_of([p for p, _ in LENGTHS]),
        token_ids=torch.randint(0, VOCABULARY, (num_response,), generator=draw),
        offsets=offsets_of([t for _, t in LENGTHS]),
        rollout_logprobs=torch.zeros(num_response),
        policy_versions=torch.zeros(num_response, dtype=torch.int64),
        rewards=torch.zeros(len(LENGTHS)),
        groups=torch.arange(len(LENGTHS)),
        truncated=torch.zeros(len(LENGTHS), dtype=torch.bool),
        temperature=TEMPERATURE,
    )


def model_config(folder: Path, kind: Any = "auto") -> ModelConfig:
    return ModelConfig(path=str(folder), precision="float32", attention=kind, logprobs="chunked")


def padded(batch: Batch) -> tuple[Tensor, Tensor]:
    """(B, width) token ids and mask, padded on the right."""
    rows = []
    for i in range(batch.num_responses):
        prompt = batch.prompt_token_ids[batch.prompt_offsets[i] : batch.prompt_offsets[i + 1]]
        rows.append(torch.cat([prompt, batch.token_ids[batch.offsets[i] : batch.offsets[i + 1]]]))
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return ids, torch.arange(ids.shape[1]) < lengths[:, None]


def padded_answers(folder: Path, batch: Batch) -> tuple[Any, Tensor, Tensor, Tensor]:
    """A new model of transformers, and its logprobs, entropies and last hidden states of response tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    ids, mask = padded(batch)
    output = model(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True)
    every = torch.log_softmax(output.logits / TEMPERATURE, -1)
    logprobs, entropies, states = [], [], []
    for i, (p, t) in enumerate(LENGTHS):
        at = every[i, p - 1 : p + t - 1]
        logprobs.append(at.gather(1, ids[i, p : p + t, None])[:, 0])
        entropies.append(-(at.exp() * at).sum(-1))
        states.append(output.hidden_states[-1][i, p - 1 : p + t - 1])
    return model, torch.cat(logprobs), torch.cat(entropies), torch.cat(states)


@pytest.fixture(autouse=True)
def kernels() -> Iterator[Kernels]:
    """A CPU has no kernel for model.attention=varlen."""
    with flash_on_cpu() as calls:
        yield calls


@pytest.mark.parametrize("attention", ["sdpa", "varlen", "eager"])
@pytest.mark.parametrize(
    "parts", [[[0, 1, 2, 3, 4]], [[2, 0], [4, 3, 1]], [[2, 0, 1, 4, 3]]], ids=["one row", "two rows", "shared prompts"]
)
def test_policy(
    folder: Path, batch: Batch, exactness: Exactness, attention: str, parts: list[list[int]], request: Any
) -> None:
    model, logprobs, entropies, _ = padded_answers(folder, batch)
    weights = torch.randn(batch.num_tokens, generator=torch.Generator().manual_seed(2))
    ((logprobs + 0.3 * entropies) * weights).sum().backward()
    policy = PolicyNetwork(load_causal_lm(model_config(folder, attention)))
    found, found_entropies = torch.zeros(batch.num_tokens), torch.zeros(batch.num_tokens)
    architecture, *layout = request.node.callspec.id.rsplit("-", 2)
    prompts = Prompts.of(batch) if "shared prompts" in layout else None
    if prompts is not None and attention == "eager":
        pytest.skip("eager attention does not share prompts")
    for rows in parts:
        micro = build_micro_batch(batch, torch.tensor(rows), prompts)
        own, own_entropies = policy(micro, TEMPERATURE, True)
        assert own_entropies is not None
        ((own + 0.3 * own_entropies) * weights[micro.token_index]).sum().backward()
        found[micro.token_index], found_entropies[micro.token_index] = own.detach(), own_entropies.detach()
    torch.testing.assert_close(found, logprobs.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found_entropies, entropies.detach(), atol=1e-5, rtol=1e-5)
    expected = dict(model.named_parameters())
    worst = 0.0
    for name, parameter in policy.causal_lm.named_parameters():
        assert parameter.grad is not None
        scale = float(expected[name].grad.abs().max())
        torch.testing.assert_close(parameter.grad, expected[name].grad, atol=1e-5 * scale, rtol=1e-4, msg=name)
        worst = max(worst, largest_difference(parameter.grad, expected[name].grad) / scale)
    figures = {
        "logprobs": largest_difference(found, logprobs),
        "entropies": largest_difference(found_entropies, entropies),
        "gradient, of each parameter's largest": worst,
    }
    exactness.record("Architectures", f"{architecture}, {', '.join(reversed(layout))}", figures)


def test_activation_checkpointing_changes_nothing(folder: Path, batch: Batch) -> None:
    gradients = []
    for enabled in (False, True):
        policy = PolicyNetwork(load_causal_lm(model_config(folder))).train()
        if enabled:
            policy.causal_lm.gradient_checkpointing_enable()
            assert policy.causal_lm.is_gradient_checkpointing
        policy(build_micro_batch(batch, torch.arange(5)), 1.0, False)[0].sum().backward()
        gradients.append([parameter.grad for parameter in policy.parameters()])
    for with_it, without in zip(*gradients, strict=True):
        assert without is not None
        torch.testing.assert_close(with_it, without)


def test_critic(folder: Path, batch: Batch) -> None:
    _, _, _, states = padded_answers(folder, batch)
    critic = CriticNetwork.on(load_causal_lm(model_config(folder)))
    nn.init.normal_(critic.value_head.weight)
    values, _ = critic(build_micro_batch(batch, torch.arange(5)))
    torch.testing.assert_close(values, critic.value_head(states)[:, 0], atol=1e-5, rtol=1e-5)


def test_a_critic_with_a_smaller_embedding_reads_the_policys_padding(folder: Path, batch: Batch) -> None:
    """A token beyond it counts as its last one, and moves no other sequence."""
    critic = CriticNetwork.on(load_causal_lm(model_config(folder)))
    nn.init.normal_(critic.value_head.weight)
    last, beyond = (replace(batch, token_ids=batch.token_ids.clone()) for _ in range(2))
    last.token_ids[3], beyond.token_ids[3] = VOCABULARY - 1, VOCABULARY + 100
    values = [critic(build_micro_batch(one, torch.arange(5)))[0] for one in (last, beyond)]
    assert torch.equal(*values)


def test_a_critic_is_exported_and_loaded_with_all_of_its_outputs(folder: Path, batch: Batch, tmp_path: Path) -> None:
    model = model_config(folder)
    critic = CriticNetwork.on(load_causal_lm(model), num_outputs=5)
    nn.init.normal_(critic.value_head.weight)
    nn.init.normal_(critic.value_head.bias)
    build_tokenizer(["word"]).save_pretrained(tmp_path)
    critic.export(critic.named_parameters(), str(tmp_path), tmp_path / "critic")
    loaded = CriticNetwork.load(model.model_copy(update={"path": str(tmp_path / "critic")}), num_outputs=5)
    micro = build_micro_batch(batch, torch.arange(5))
    outputs = critic(micro)[0]
    assert outputs.shape == (micro.token_ids.numel(), 5)
    torch.testing.assert_close(loaded(micro)[0], outputs)


def test_no_token_sees_another_sequence(folder: Path, batch: Batch) -> None:
    """Other tokens in the sequences before and after do not change a bit."""
    policy = PolicyNetwork(load_causal_lm(model_config(folder)))
    micro = build_micro_batch(batch, torch.tensor([0, 2, 3]))
    other = replace(batch, token_ids=batch.token_ids.clone(), prompt_token_ids=batch.prompt_token_ids.clone())
    for i in (0, 3):  # the sequences before and after
        other.token_ids[other.offsets[i] : other.offsets[i + 1]] += 1
        other.prompt_token_ids[other.prompt_offsets[i] : other.prompt_offsets[i + 1]] += 1
    other = replace(other, token_ids=other.token_ids % VOCABULARY, prompt_token_ids=other.prompt_token_ids % VOCABULARY)
    perturbed = build_micro_batch(other, torch.tensor([0, 2, 3]))
    middle = (micro.token_index >= batch.offsets[2]) & (micro.token_index < batch.offsets[3])
    with torch.no_grad():
        before, after = policy(micro, 1.0, False)[0], policy(perturbed, 1.0, False)[0]
    assert torch.equal(before[middle], after[middle])
    assert not bool(torch.isclose(before[~middle], after[~middle]).all())


@pytest.mark.parametrize("recomputed", [False, True])
def test_varlen_runs_one_kernel_for_a_layer(folder: Path, batch: Batch, kernels: Kernels, recomputed: bool) -> None:
    """Two sequences of equal and three of other lengths; the bounds are computed once for the row."""
    policy = PolicyNetwork(load_causal_lm(model_config(folder, "varlen"))).train()
    if recomputed:
        policy.causal_lm.gradient_checkpointing_enable()
    policy(build_micro_batch(batch, torch.arange(5)), 1.0, False)[0].sum().backward()
    layers = SIZE["num_hidden_layers"]
    assert len(kernels.windows) == layers * (1 + recomputed) and kernels.num_backward == layers
    assert all(bounds is kernels.bounds[0] for bounds in kernels.bounds)
    window = policy.causal_lm.config.to_dict().get("sliding_window")
    assert set(kernels.windows) == ({(-1, 0)} if window is None else {(-1, 0), (window - 1, 0)})


@pytest.mark.parametrize("attention", ["sdpa", "varlen"])
def test_a_window_beyond_the_longest_sequence_is_none(
    tmp_path: Path, batch: Batch, kernels: Kernels, attention: str
) -> None:
    logprobs = []
    for window in (None, 21):
        config = Qwen2Config(**SIZE, use_sliding_window=window is not None, sliding_window=window, max_window_layers=0)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
        policy = PolicyNetwork(load_causal_lm(model_config(tmp_path, attention)))
        logprobs.append(policy(build_micro_batch(batch, torch.arange(5)), 1.0, False)[0])
    assert torch.equal(*logprobs)
    assert set(kernels.windows) <= {(-1, 0)}


def test_auto_is_varlen_for_half_numbers_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "packed_varlen", lambda *_, **__: "varlen")
    monkeypatch.setattr(attention, "packed_sdpa", lambda *_, **__: "sdpa")

    def chosen(is_cuda: bool, dtype: torch.dtype) -> Any:
        return attention.packed_attention(nn.Identity(), cast(Tensor, SimpleNamespace(is_cuda=is_cuda, dtype=dtype)))

    assert chosen(True, torch.bfloat16) == chosen(True, torch.float16) == "varlen"
    assert chosen(True, torch.float32) == chosen(False, torch.bfloat16) == chosen(False, torch.float32) == "sdpa"


def test_varlen_refuses_dropout() -> None:
    rows = [torch.zeros(1, 2, 3, 8)] * 3
    bounds = torch.tensor([0, 3], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match=r"attention_dropout = 0\.1, but model.attention = varlen"):
        attention.packed_varlen(nn.Identity(), *rows, None, cu_seq_lens_q=bounds, max_length_q=3, dropout=0.1)


def test_scaled_logits(tmp_path: Path, batch: Batch) -> None:
    model = AutoModelForCausalLM.from_config(GraniteConfig(**SIZE, logits_scaling=0.25, attention_multiplier=0.2))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path)
    model, logprobs, entropies, _ = padded_answers(tmp_path, batch)
    policy = PolicyNetwork(load_causal_lm(model_config(tmp_path)))
    found = policy(build_micro_batch(batch, torch.arange(5)), TEMPERATURE, True)
    gradients = []
    for numbers, network in ((found, policy.causal_lm), ((logprobs, entropies), model)):
        (numbers[0].sum() + 0.3 * numbers[1].sum()).backward()
        gradients.append(network.model.layers[0].mlp.down_proj.weight.grad)
    torch.testing.assert_close(found, (logprobs, entropies), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


def test_a_cap_on_scores_is_refused_and_eager_has_it(tmp_path: Path, batch: Batch) -> None:
    config = Gemma2Config(**SIZE, head_dim=8, final_logit_softcapping=None, attn_logit_softcapping=2.0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path)
    micro = build_micro_batch(batch, torch.arange(5))
    for kind in ("sdpa", "varlen"):
        with pytest.raises(NotImplementedError, match=r"a cap on its scores: set model\.attention=eager"):
            PolicyNetwork(load_causal_lm(model_config(tmp_path, kind)))(micro, TEMPERATURE, False)
    _, logprobs, _, _ = padded_answers(tmp_path, batch)
    found, _ = PolicyNetwork(load_causal_lm(model_config(tmp_path, "eager")))(micro, TEMPERATURE, False)
    torch.testing.assert_close(found, logprobs, atol=1e-5, rtol=1e-5)


def test_the_length_at_which_attention_costs_as_much_as_the_matrices(folder: Path) -> None:
    """A token costs two FLOPs per weight, and QK^T and PV over half of the T tokens on average."""
    policy = PolicyNetwork(load_causal_lm(model_config(folder)))
    found = PassCost.of(policy).attention_tokens
    config = policy.causal_lm.config
    linear = sum(m.weight.numel() for m in policy.causal_lm.base_model.modules() if isinstance(m, nn.Linear))
    heads = config.num_attention_heads * policy.causal_lm.base_model.layers[0].self_attn.head_dim
    per_token_matrices = 2 * linear
    per_token_attention = config.num_hidden_layers * 2 * 2 * heads * (found / 2)
    assert per_token_attention == pytest.approx(per_token_matrices)
