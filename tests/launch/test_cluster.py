"""The steps of docs/clusters.md on one machine: a cluster with a token; a job is submitted, followed and finished."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.request import Request, urlopen

import psutil
import pytest

pytestmark = [pytest.mark.alone, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
START_TIMEOUT_S, JOB_TIMEOUT_S, END_TIMEOUT_S = 120, 400, 30  # generous: the machine may be busy
PORTS = ("--dashboard-port", "--ray-client-server-port", "--dashboard-agent-listen-port", "--port")


@dataclass(frozen=True)
class Cluster:
    address: str
    env: dict[str, str]
    process: psutil.Process

    def submit(self, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "launch/submit.py", "--address", self.address, *arguments]
        return subprocess.run(
            command, cwd=ROOT, env=env or self.env, capture_output=True, text=True, timeout=JOB_TIMEOUT_S
        )

    def start_submitting(self, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-u", "launch/submit.py", "--address", self.address, *arguments]
        return subprocess.Popen(
            command, cwd=ROOT, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="sae", dir="/tmp"))  # a short path, since paths of sockets are limited
    ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
    env = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "SAE_RL_"))}
    env |= {"RAY_AUTH_TOKEN": secrets.token_hex(32), "PATH": f"{Path(sys.executable).parent}:{env['PATH']}"}
    flags = [f"{flag}={port}" for flag, port in ports.items()]
    flags += ["--num-cpus=2", "--num-gpus=0", "--object-store-memory=200000000", f"--temp-dir={folder}", "--block"]
    log = (folder / "start.log").open("w")
    head = psutil.Popen(["launch/cluster.sh", "head", *flags], cwd=ROOT, env=env, stdout=log, stderr=log)
    try:
        wait_for_port(ports["--dashboard-port"], head, folder / "start.log")
        yield Cluster(f"http://127.0.0.1:{ports['--dashboard-port']}", env, head)
    finally:
        started = [*head.children(recursive=True), *marked(folder, env["RAY_AUTH_TOKEN"])]
        head.terminate()
        _, alive = psutil.wait_procs([head, *started], timeout=END_TIMEOUT_S)
        alive = list({*alive, *marked(folder, env["RAY_AUTH_TOKEN"])})
        for process in alive:
            process.kill()
        log.close()
        shutil.rmtree(folder, ignore_errors=True)
    assert not alive, f"left behind by the cluster: {alive}"


def marked(folder: Path, token: str) -> list[psutil.Process]:
    """Processes whose command line or environment says that they belong to the cluster."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(folder) in " ".join(process.cmdline()) or process.environ().get("RAY_AUTH_TOKEN") == token:
                found.append(process)
        except psutil.Error:
            continue  # the process has ended, or is another user's
    return found


def wait_for_port(port: int, process: psutil.Popen, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.5)
    pytest.fail(f"no dashboard after {START_TIMEOUT_S} s:\n{log.read_text()}")


def tiny_run(tiny_model: Path, output_dir: Path, *overrides: str) -> list[str]:
    return [
        "--",
        f"model.path={tiny_model}",
        f"output_dir={output_dir}",
        "logger=off",
        "logger.console=plain",
        "steps=2",
        "task.train.num_prompts=8",
        "rollout.prompts_per_step=2",
        "rollout.group_size=2",
        "rollout.max_response_tokens=24",
        "rollout.kv_cache_gb=0.1",
        "rollout.max_num_seqs=8",
        "learner.policy.num_mini_batches=1",
        "learner.critic.num_mini_batches=1",
        "learner.critic_pretraining.num_prompts=0",
        "checkpoint.every_steps=0",
        *overrides,
    ]


def test_a_misspelt_key_is_refused_before_anything_is_sent(cluster: Cluster, tiny_model: Path, tmp_path: Path) -> None:
    done = cluster.submit(*tiny_run(tiny_model, tmp_path / "run", "rollout.group_sise=2"))
    assert done.returncode == 2
    assert "did you mean 'group_size'" in done.stderr and "nothing was submitted" in done.stderr
    assert list_jobs(cluster) == []


def test_without_the_token_the_cluster_is_closed(cluster: Cluster, tiny_model: Path, tmp_path: Path) -> None:
    env = cluster.env | {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
    done = cluster.submit(*tiny_run(tiny_model, tmp_path / "run"), env=env)
    assert done.returncode == 1 and "rejects the token" in done.stderr


def test_a_run_is_submitted_followed_and_finished(cluster: Cluster, tiny_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    done = cluster.submit("--env", "HF_HUB_OFFLINE=1", *tiny_run(tiny_model, output))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "new run in" in done.stdout
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert {row["step"] for row in rows} == {0, 1}
    assert (output / "policy" / "model.safetensors").is_file()
    assert list_jobs(cluster) == ["SUCCEEDED"]


def test_interrupting_stops_the_job_only_if_asked_to(cluster: Cluster, tiny_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    following = cluster.start_submitting(*tiny_run(tiny_model, output, "steps=1000000"))
    wait_for_file(output / "config.yaml", following)
    following.send_signal(signal.SIGINT)
    text, _ = following.communicate(timeout=120)
    assert following.returncode == 130 and "continues" in text and "RAY_AUTH_MODE=token ray job stop" in text
    assert list_jobs(cluster).count("RUNNING") == 1
    stop = next(line for line in text.splitlines() if line.startswith("stop it:")).removeprefix("stop it:")
    subprocess.run(["bash", "-c", stop], env=cluster.env, check=True, capture_output=True, timeout=120)
    assert "STOPPED" in list_jobs(cluster)
    following = cluster.start_submitting(
        "--stop-on-interrupt", *tiny_run(tiny_model, tmp_path / "other", "steps=1000000")
    )
    wait_for_file(tmp_path / "other" / "config.yaml", following)
    following.send_signal(signal.SIGINT)
    following.communicate(timeout=120)
    assert following.returncode == 130
    assert "RUNNING" not in list_jobs(cluster)


def wait_for_file(file: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not file.exists():
        assert process.poll() is None and time.monotonic() < deadline, f"{file} did not appear"
        time.sleep(0.5)


def list_jobs(cluster: Cluster) -> list[str]:
    """The status of every submitted job."""
    authorization = {"Authorization": f"Bearer {cluster.env['RAY_AUTH_TOKEN']}"}
    with urlopen(Request(f"{cluster.address}/api/jobs/", headers=authorization), timeout=60) as answer:
        return [job["status"] for job in json.load(answer) if job["submission_id"]]
