"""What stops a run before Ray starts, for ``train``, ``--print`` and ``dry_run=true`` alike."""

from __future__ import annotations

import json
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

from sae_rl import checkpoint
from sae_rl.commands.run_folder import find_checkpoint
from sae_rl.config.compose import load_config
from sae_rl.digests import Digest
from sae_rl.settings import ConfigError

from ..conftest import CommandLine, Outcome
from .refused import assert_refused

Train = Callable[..., Outcome]
WAYS = ((), ("--print",), ("dry_run=true",))
VERIFIERS = "rewards.verifiers={mine: {name: function, path: nowhere:check}}"


def damaged(tiny_model: Path, folder: Path, damage: str) -> tuple[Path, str]:
    """A model's folder with that damage, and what is said about it."""
    shutil.copytree(tiny_model, folder)
    weights, config = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
    content = weights.read_bytes()
    if damage == "no weights":
        weights.unlink()
        return folder, "the folder has no weights: neither model.safetensors nor pytorch_model.bin"
    if damage == "cut":
        weights.write_bytes(content[: len(content) // 2])
        return folder, "model.safetensors cannot be read; it may have been cut"
    if damage == "git-lfs":
        weights.write_text("version https://git-lfs.github.com/spec/v1\n")
        return folder, "model.safetensors is a pointer of git-lfs; fetch the weights with `git lfs pull`"
    if damage in ("missing shard", "lacking tensor", "broken index"):
        weights.rename(folder / "a.safetensors")
        files = {"model.norm.weight": "a.safetensors"}
        files |= {
            "missing shard": {"lm_head.weight": "b.safetensors"},
            "lacking tensor": {"no.weight": "a.safetensors"},
        }.get(damage, {})
        text = "{" if damage == "broken index" else json.dumps({"weight_map": files})
        (folder / "model.safetensors.index.json").write_text(text)
        return folder, {
            "missing shard": "1 of 2 files with weights are missing: b.safetensors",
            "lacking tensor": "a.safetensors lacks 1 of the tensors in its index, such as no.weight",
            "broken index": "model.safetensors.index.json cannot be read",
        }[damage]
    if damage == "critic":
        config["architectures"] = ["Qwen3ForTokenClassification"]
    if damage == "vocabulary":
        config["vocab_size"] = 8
    if damage in ("capped logits", "capped scores"):
        caps = {"final_logit_softcapping": 30.0 if damage == "capped logits" else None, "attn_logit_softcapping": 50.0}
        config |= {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2"} | caps
    (folder / "config.json").write_text(json.dumps(config))
    if damage == "adapters":
        (folder / "config.json").rename(folder / "adapter_config.json")
    return folder, {
        "critic": "it is a Qwen3ForTokenClassification, but a policy is a language model",
        "vocabulary": ", but the model knows 8 tokens; take the tokenizer that belongs to the model",
        "capped logits": "it caps its logits at 30; such models cannot be trained",
        "capped scores": "it caps the scores of its attention: set model.attention=eager",
        "adapters": "holds adapters without their model; merge them first",
    }[damage]


DAMAGES = [
    *("no weights", "cut", "git-lfs", "missing shard", "lacking tensor"),
    *("broken index", "critic", "vocabulary", "capped logits", "capped scores", "adapters"),
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_model_that_cannot_be_loaded(damage: str, train: Train, tiny_model: Path, tmp_path: Path) -> None:
    folder, said = damaged(tiny_model, tmp_path / "damaged", damage)
    started = time.monotonic()
    assert_refused(train(f"model.path={folder}"), "model.path", str(folder), said)
    assert time.monotonic() - started < 30  # a worker used to say it after a minute
    assert not (tmp_path / "out").exists()


def test_a_critic_that_cannot_be_loaded(train: Train, tiny_model: Path, tmp_path: Path) -> None:
    folder, said = damaged(tiny_model, tmp_path / "critic", "no weights")
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["Qwen3ForTokenClassification"]}
    (folder / "config.json").write_text(json.dumps(config | {"id2label": {"0": "LABEL_0"}}))
    key = "learner.critic_pretraining.checkpoint"
    assert_refused(train(f"{key}={folder}"), f"{key} = {folder}", said)


@pytest.mark.parametrize("way", WAYS)
def test_all_problems_at_once_in_every_way(way: tuple[str, ...], train: Train, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    outcome = train(VERIFIERS, f"cluster.address=127.0.0.1:{port}", "output_dir=file/out", *way)
    said = ["rewards.verifiers.mine: cannot import 'nowhere:check'", "output_dir = file/out: cannot write there"]
    assert_refused(outcome, f"cluster.address = '127.0.0.1:{port}': no Ray cluster answers there", *said, lines=3)
    assert ("output_dir: file/out" in outcome.stdout) == ("--print" in way)
    assert outcome.stdout.endswith("\n# No run can start with this configuration: the errors say why.\n") == (
        "--print" in way
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("task.train={name: file, path: none.jsonl, reward: math}", "task.train: none.jsonl: there is no such file"),
        ("task.train.reward=maths", "task.train.reward: name 'maths' is unknown, did you mean 'math'?"),
        ("task.train.reward=nowhere:check", "task.train.reward: cannot import 'nowhere:check'"),
    ],
)
def test_prompts_and_rewards_in_every_way(override: str, said: str, way: tuple[str, ...], train: Train) -> None:
    overrides = ["~task.train", f"+{override}"] if override.startswith("task.train={") else [override]
    sizes = [] if override.startswith("task.train={") else ["task.train.num_prompts=4"]
    assert_refused(train(*overrides, *way) if not sizes else train(*overrides, *sizes, *way), said)


@pytest.mark.parametrize("address", ["ray://127.0.0.1:1", "127.0.0.1:1", "auto", "here", "ray://no.such.host.invalid"])
@pytest.mark.parametrize("command", ["train", "evaluate", "pretrain-critic", "doctor"])
def test_a_cluster_that_does_not_answer(
    address: str, command: str, sae_rl: CommandLine, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", set)
    monkeypatch.setattr("ray._private.services.find_bootstrap_address", lambda folder: None)
    outcome = sae_rl(
        command, f"model.path={tiny_model}", f"cluster.address={address}", "rollout.max_response_tokens=64"
    )
    assert_refused(outcome, f"cluster.address = '{address}': no Ray cluster answers there")


@pytest.fixture
def listening() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def head() -> Iterator[int]:
    """A port that answers as the head of a Ray cluster."""

    class Head(gcs_service_pb2_grpc.NodeInfoGcsServiceServicer):  # type: ignore[misc]
        def CheckAlive(self, request: Any, context: Any) -> Any:
            return gcs_service_pb2.CheckAliveReply()

    server = grpc.server(ThreadPoolExecutor())
    gcs_service_pb2_grpc.add_NodeInfoGcsServiceServicer_to_server(Head(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield port
    server.stop(None).wait()


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_port_where_something_else_than_ray_listens(scheme: str, train: Train, listening: int) -> None:
    started = time.monotonic()
    outcome = train(f"cluster.address={scheme}127.0.0.1:{listening}", "dry_run=true")
    assert_refused(outcome, "no Ray cluster answers there (no answer within 5 s: DEADLINE_EXCEEDED)")
    assert time.monotonic() - started < 15  # Ray itself gives up after 40 s


def test_the_heads_port_is_not_that_of_rays_client(train: Train, head: int) -> None:
    outcome = train(f"cluster.address=ray://127.0.0.1:{head}", "dry_run=true")
    assert_refused(outcome, "something other than Ray listens: UNIMPLEMENTED")


def test_dry_run_says_what_would_run_and_starts_nothing(train: Train, tmp_path: Path, head: int) -> None:
    outcome = train("dry_run=true", f"cluster.address=127.0.0.1:{head}")
    assert (outcome.code, outcome.stderr) == (0, "")
    lines = outcome.stdout.splitlines()
    assert lines[0] == "every check passed; dry_run = true, so nothing is started"
    assert "  prompts: 4 to train on, 2 held out" in lines
    assert f"  workers: 2 rollout, 1 policy, 1 critic, on cpu, in 127.0.0.1:{head}" in lines
    assert "  steps: 0 to 2, each of 4 responses" in lines
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["evaluate", "pretrain-critic"])
def test_dry_run_of_other_commands(command: str, sae_rl: CommandLine, tiny_model: Path, tmp_path: Path) -> None:
    outcome = sae_rl(command, f"model.path={tiny_model}", "dry_run=true", "rollout.max_response_tokens=64")
    assert (outcome.code, outcome.stderr) == (0, "")
    assert "every check passed" in outcome.stdout and not list(tmp_path.iterdir())


def test_print_checks_and_shows(train: Train) -> None:
    outcome = train("--print")
    assert (outcome.code, outcome.stderr) == (0, "")
    assert yaml.safe_load(outcome.stdout)["steps"] == 2


def checkpoint_at(folder: Path, ranks: int = 1) -> Path:
    state = {"step": 1, "sampler": {}}
    (folder / "policy").mkdir(parents=True)
    (folder / "critic").mkdir()
    (folder / "driver.json").write_text(json.dumps(state))
    checkpoint.write_manifest(folder, {})
    for rank in range(ranks):
        for role in ("policy", "critic"):
            (folder / role / f"random_state_{rank}.pt").touch()
    return folder


def test_a_checkpoint_that_cannot_be_resumed(train: Train, tmp_path: Path) -> None:
    folder = checkpoint_at(tmp_path / "out" / "checkpoints" / "step_000001", ranks=0)
    assert_refused(train(), "cannot resume from", "it lacks its policy; remove it to resume from an earlier one")
    for role in ("policy", "critic"):
        (folder / role / "random_state_0.pt").touch()
    wider = ["cluster.policy.num_workers=2", "cluster.critic.num_workers=2"]
    assert_refused(train(*wider), "1 ranks of the policy wrote it, but cluster.policy.num_workers = 2")
    (folder / "driver.json").write_text("{")
    assert_refused(train(), "driver.json cannot be read", "remove that folder to resume from the one before it")


def test_a_disk_that_is_too_small(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: shutil._ntuple_diskusage(1, 1, 100_000))  # type: ignore[attr-defined]
    assert_refused(train(), "output_dir = out", "0.0 GiB are free, but 1 checkpoints take at least", "keep_last")


def test_our_checkpoint_is_a_model(train: Train, tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "step_000003"
    shutil.copytree(tiny_model, folder / "hf")
    assert train(f"model.path={folder}", "dry_run=true").code == 0
    (folder / "hf" / "model.safetensors").unlink()
    assert_refused(train(f"model.path={folder}"), f"model.path = {folder}/hf: the folder has no weights")


def test_a_name_that_nobody_downloaded(train: Train) -> None:
    outcome = train("model.path=nobody/nothing", "model.context_tokens=1024")
    assert_refused(outcome, "model.path = nobody/nothing: its weights are not in the hub's cache", "HF_HUB_OFFLINE")


def test_replay_of_too_little(train: Train, tmp_path: Path) -> None:
    assert_refused(train(f"replay={tmp_path}", "dry_run=true"), "0 steps are recorded", "steps = 2")
    (tmp_path / "rollouts").mkdir()
    for step in (0, 1):
        (tmp_path / "rollouts" / f"step_{step:06d}.parquet").write_text("cut")
    assert_refused(train(f"replay={tmp_path}"), f"replay = {tmp_path}", "step_000000.parquet holds no rollouts")


def test_a_list_of_files(train: Train, tmp_path: Path) -> None:
    for name in ("a", "b"):
        rows = [{"prompt": f"I0 D+{i}", "reward_model": {"ground_truth": "1"}} for i in range(1, 5)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = ["task=dapo_math", "task.max_prompt_tokens=32", "task.train.path=[a.jsonl,b.jsonl]"]
    outcome = train(*files, "task.evaluation.path=b.jsonl", "dry_run=true")
    assert "  prompts: 8 to train on, 4 held out" in outcome.stdout, outcome.stderr


@pytest.mark.parametrize("command", ["demo", "doctor"])
def test_commands_without_a_dry_run_say_so(command: str, sae_rl: CommandLine, tiny_model: Path, tmp_path: Path) -> None:
    outcome = sae_rl(command, f"model.path={tiny_model}", "rollout.max_response_tokens=64", "dry_run=true")
    assert_refused(outcome, "dry_run = true", "use `sae-rl train`")
    assert not list(tmp_path.iterdir())


def test_damaged_checkpoints_are_named(train: Train, tiny_model: Path, tmp_path: Path) -> None:
    root = tmp_path / "out" / "checkpoints"
    for step in (1, 2):
        folder = checkpoint_at(root / f"step_{step:06d}")
        checkpoint.write_manifest(folder, {"hf": Digest(3, "")} if step == 2 else {})
    found = find_checkpoint(load_config([f"model.path={tiny_model}", f"output_dir={tmp_path}/out"]))
    assert found.folder == root / "step_000001"
    assert found.note == "resuming from step_000001, since newer checkpoints are damaged: step_000002 (hf is missing)"
    assert found.damaged == ("step_000002",)
    checkpoint.write_manifest(root / "step_000001", {"hf": Digest(3, "")})
    said = (
        "damaged checkpoints alone: step_000002 (hf is missing), step_000001 (hf is missing); choose another output_dir"
    )
    assert_refused(train(), said)


def test_a_checkpoint_is_read_or_refused(tmp_path: Path) -> None:
    from sae_rl.commands.run_folder import read_checkpoint

    assert read_checkpoint(checkpoint_at(tmp_path / "step_000001")) == checkpoint.DriverState(step=1, sampler={})
    with pytest.raises(ConfigError, match="is no checkpoint"):
        read_checkpoint(tmp_path)
