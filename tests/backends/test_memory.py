"""The estimate of GPU memory against real layers, published sizes, and the recipes that rely on it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, Qwen3Config

from sae_rl.backends.memory import GIB, Estimate, Shape, describe, estimate
from sae_rl.config.compose import load_config
from sae_rl.config.schema import Config
from tests.conftest import CommandLine

FILES = ("task.train.path=/no/train.jsonl", "task.evaluation.path=/no/heldout.jsonl")
# From the models' published config.json; all have a head size of 128 and 8 key-value heads.
KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "tie_word_embeddings")
QWEN3 = {
    "0.6B": (1024, 3072, 28, 16, True),
    "4B": (2560, 9728, 36, 32, True),
    "8B": (4096, 12288, 36, 32, False),
    "14B": (5120, 17408, 40, 40, False),
}
RECIPES = {  # overrides -> size of the model, GiB of one GPU
    ("experiment=one_gpu",): ("0.6B", 24),
    ("experiment=one_gpu", "cluster=gpus_2"): ("0.6B", 24),
    ("experiment=paper_4b",): ("4B", 80),
    ("experiment=paper_8b",): ("8B", 80),
    ("experiment=paper_8b", "cluster=gpus_8", "learner=offload"): ("8B", 80),
    ("experiment=paper_14b",): ("14B", 80),
}
USABLE = 0.9  # the rest is for CUDA contexts, NCCL and fragmentation


def folder_of(size: str, root: Path) -> Path:
    """A folder with the configuration of a Qwen3, without weights."""
    config = dict(zip(KEYS, QWEN3[size], strict=True), head_dim=128, num_key_value_heads=8, vocab_size=151_936)
    (folder := root / size).mkdir()
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "qwen3", "max_position_embeddings": 32768}))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("qwen3")
    return {size: folder_of(size, root) for size in QWEN3}


def composed(models: dict[str, Path], size: str, *overrides: str) -> tuple[Config, Estimate]:
    files = FILES if "experiment=one_gpu" in overrides else ()
    config = load_config([*overrides, *files, f"model.path={models[size]}"])
    return config, estimate(config, Shape.read(config.model.path))


@pytest.mark.parametrize(
    ("size", "parameters"),
    [("0.6B", 596_049_920), ("4B", 4_022_468_096), ("8B", 8_190_735_360), ("14B", 14_768_307_200)],
)
def test_parameters_are_those_of_the_published_models(models: dict[str, Path], size: str, parameters: int) -> None:
    assert Shape.read(str(models[size])).parameters == parameters


def saved_bytes(config: Qwen3Config, dtype: torch.dtype, tokens: int, checkpointing: bool) -> int:
    """What autograd keeps of a forward pass through the layers, but for weights."""
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # kept alive, so that no address is used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=torch.arange(tokens)[None], use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize(("dtype", "width"), [(torch.bfloat16, 2), (torch.float32, 4)])
@pytest.mark.parametrize("changes", [{}, {"intermediate_size": 1024}, {"num_attention_heads": 8}, {"hidden_size": 512}])
def test_a_layer_saves_what_the_estimate_counts(
    dtype: torch.dtype, width: int, changes: dict[str, int], tmp_path: Path
) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4} | changes
    sizes |= {"num_key_value_heads": 2, "head_dim": 64, "vocab_size": 512}
    one, two = (Qwen3Config(**sizes, num_hidden_layers=layers) for layers in (1, 2))
    one.save_pretrained(tmp_path)
    shape, tokens = Shape.read(str(tmp_path)), 256
    layer = saved_bytes(two, dtype, tokens, False) - saved_bytes(one, dtype, tokens, False)
    assert layer / tokens == pytest.approx(shape.saved_by_layer(width), rel=0.02)
    recomputed = saved_bytes(two, dtype, tokens, True) - saved_bytes(one, dtype, tokens, True)
    assert recomputed == width * shape.hidden * tokens


@pytest.mark.parametrize("recipe", RECIPES, ids=" ".join)
def test_every_recipe_fits_its_gpus(models: dict[str, Path], recipe: tuple[str, ...]) -> None:
    size, gpu = RECIPES[recipe]
    config, found = composed(models, size, *recipe)
    usable = USABLE * gpu * GIB
    assert found.learning < usable
    assert found.sampling(gpu * GIB) < usable
    share = config.rollout.gpu_memory_utilization * gpu * GIB
    assert found.responses(share) > 16, "an engine decodes enough responses of full length at the same time"


def test_a_critic_of_another_base_model_is_counted(models: dict[str, Path]) -> None:
    def critics(*overrides: str) -> tuple[dict[str, float], dict[str, float]]:
        config, found = composed(models, "8B", "experiment=paper_8b", *overrides)
        small = Shape.read(config.critic_model.path)
        (learner,) = [
            each for each in estimate(config, Shape.read(config.model.path), small).learners if each.role == "critic"
        ]
        (same,) = [each for each in found.learners if each.role == "critic"]
        return learner.resident, same.resident

    small, large = critics(f"learner.critic.model.path={models['0.6B']}")
    assert small["weights"] == 2 * 596_049_920 / 8 and large["weights"] > 10 * small["weights"]
    exact, _ = critics(f"learner.critic.model.path={models['0.6B']}", "learner.critic.model.precision=float32")
    assert exact["weights"] == 2 * small["weights"] and exact["optimizer"] == 8 * 596_049_920 / 8
    config, _ = composed(models, "8B", "experiment=paper_8b", f"learner.critic.model.path={models['0.6B']}")
    told = "\n".join(describe(config))
    whole = "\n".join(describe(composed(models, "8B", "experiment=paper_8b")[0]))
    assert "a rank of critic holds" in told and told != whole


def test_the_page_states_the_estimate(models: dict[str, Path]) -> None:
    page = (Path(__file__).parents[2] / "docs/clusters.md").read_text()
    for recipe, (size, _) in RECIPES.items():
        if recipe[-1] != "cluster=gpus_2":
            config, found = composed(models, size, *recipe)
            host = sum(each.host for each in found.learners) * config.cluster.policy.num_workers
            sizes = (
                f"{found.learning / GIB:.1f} | {host / GIB:.0f} | {found.engine / GIB:.1f} | {found.response / GIB:.2f}"
            )
            rows = [line for line in page.splitlines() if line.startswith(f"| `{' '.join(recipe)}`")]
            assert len(rows) == 1 and f"| {found.held / GIB:.1f}" in rows[0] and rows[0].endswith(f"| {sizes} |")


def test_without_offload_they_do_not_fit(models: dict[str, Path]) -> None:
    for recipe, size, gpu in (
        (("experiment=one_gpu", "learner=paper"), "0.6B", 24),
        (("experiment=paper_8b", "cluster=gpus_8"), "8B", 80),
    ):
        assert composed(models, size, *recipe)[1].learning > USABLE * gpu * GIB


def test_states_are_sharded_offloaded_and_left_out(models: dict[str, Path]) -> None:
    def policy(*overrides: str) -> dict[str, float]:
        return composed(models, "8B", "experiment=paper_8b", *overrides)[1].learners[0].resident

    parameters = 8_190_735_360
    assert policy()["weights"] == 2 * parameters / 8
    assert policy()["gradients"] == 4 * parameters / 8
    assert policy()["optimizer"] == 12 * parameters / 8
    assert policy("learner.policy.zero_stage=1")["weights"] == 2 * parameters
    assert policy("learner=offload")["optimizer"] == 0
    adapters = 16 * 36 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 12288))
    assert policy("learner.lora.rank=16")["optimizer"] == 12 * adapters / 8
    found = composed(models, "8B", "experiment=paper_8b", "learner=offload")[1]
    assert found.learners[0].host == 16 * parameters / 8


def test_print_adds_the_estimate_in_comments(sae_rl: CommandLine, models: dict[str, Path]) -> None:
    outcome = sae_rl("train", "--print", "experiment=one_gpu", *FILES, f"model.path={models['0.6B']}")
    assert outcome.code == 2 and "the folder has no weights" in outcome.stderr  # it has its config.json alone
    assert yaml.safe_load(outcome.stdout)["name"] == "one_gpu"
    *comments, last = [line for line in outcome.stdout.splitlines() if line.startswith("# ")]
    assert last == "# No run can start with this configuration: the errors say why."
    assert "596,049,920 parameters" in comments[0] and "engines share the learners' GPU" in comments[-1]
    unknown = sae_rl("train", "--print", "experiment=paper_8b")
    assert unknown.stdout.splitlines()[-2].startswith("# GPU memory is not estimated: no config.json")
