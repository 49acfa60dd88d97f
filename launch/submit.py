#!/usr/bin/env python
"""Submits a training run to a Ray cluster as a job, follows its log, and ends with the job's success.

    launch/submit.py --address http://HOST:8265 -- experiment=paper_8b output_dir=/shared/runs/8b task.train.path=...

What follows ``--`` is what would follow ``sae-rl train``. docs/clusters.md tells how to get a cluster.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

USAGE_ERROR, FAILURE, INTERRUPTED = 2, 1, 130
CONNECT_TIMEOUT_S = 10.0
STOP_WAIT_S = 60  # Ray's own 3 s are less than the driver takes to close its engines and records
RETRY_S, MAX_RETRIES = 5.0, 60
# Besides what .gitignore names, which Ray reads itself.
EXCLUDES = (
    ".git/", ".venv/", "venv/", "/outputs/", "/multirun/", "/wandb/", "/benchmarks/results/", "/dist/", "/build/",
    "__pycache__/", ".pytest_cache/", ".mypy_cache/", ".ruff_cache/", ".hypothesis/",
)  # fmt: skip


class SubmitError(RuntimeError):
    """Why the job could not be submitted or followed, and what to do about it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command line asks for."""

    address: str
    working_dir: Path
    env: dict[str, str]
    overrides: tuple[str, ...]
    check: bool
    follow: bool
    stop_on_interrupt: bool
    driver_cpus: float
    python: str

    @property
    def entrypoint(self) -> str:
        # exec: the signal that stops the job must reach Python, not a shell around it.
        return "exec " + shlex.join([self.python, "-m", "sae_rl", "train", *self.overrides])

    @property
    def runtime_env(self) -> dict[str, Any]:
        return {
            "working_dir": str(self.working_dir),
            "excludes": list(EXCLUDES),
            "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)} | self.env,
        }


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch/submit.py",
        usage="%(prog)s [options] -- key=value ...",
        description="Submits `sae-rl train key=value ...` to a Ray cluster and follows it.",
    )
    add = parser.add_argument
    add("--address", default="http://127.0.0.1:8265", help="the cluster's dashboard (%(default)s)")
    add("--working-dir", type=Path, default=Path("."), help="folder to upload (this one)")
    add(
        "--env",
        action="append",
        default=[],
        metavar="KEY[=VALUE]",
        help="a variable for all processes of the run; KEY alone takes its value from here",
    )
    add(
        "--driver-cpus",
        type=float,
        default=0.0,
        help="CPUs to reserve for the driver and its reward processes; 0: none, and the driver runs on the head (0)",
    )
    add("--python", default="python", help="interpreter on the cluster (%(default)s)")
    add("--no-check", action="store_true", help="do not check the configuration here first")
    add("--no-follow", action="store_true", help="submit, print the job's id, and leave")
    add("--stop-on-interrupt", action="store_true", help="Ctrl-C stops the job, not only the following")
    add("overrides", nargs="*", metavar="key=value", help="as for `sae-rl train`")
    return parser


def parse(arguments: Sequence[str], environment: Mapping[str, str]) -> Options:
    """Reads the command line; ``environment`` is where ``--env KEY`` takes its values from. Exits on a mistake."""
    parser = command_line()
    found = parser.parse_args(arguments)
    if flags := [override for override in found.overrides if override.startswith("-")]:
        parser.error(f"after -- only key=value, found {' '.join(flags)}; submit each run of a sweep as its own job")
    if not found.working_dir.is_dir():
        parser.error(f"--working-dir {found.working_dir}: no such folder")
    if not found.address.startswith(("http://", "https://")):
        parser.error(f"--address {found.address}: the dashboard's, for example http://127.0.0.1:8265")
    env: dict[str, str] = {}
    for entry in found.env:
        key, equals, value = entry.partition("=")
        if not equals and key not in environment:
            parser.error(f"--env {key}: not set here; set it, or write --env {key}=VALUE")
        env[key] = value if equals else environment[key]
    overrides = found.overrides
    if not any(override.lstrip("+").startswith("cluster.address=") for override in overrides):
        overrides = [*overrides, "cluster.address=auto"]
    return Options(
        address=found.address.rstrip("/"),
        working_dir=found.working_dir.resolve(),
        env=env,
        overrides=tuple(overrides),
        check=not found.no_check,
        follow=not found.no_follow,
        stop_on_interrupt=found.stop_on_interrupt,
        driver_cpus=found.driver_cpus,
        python=found.python,
    )


def check_run(options: Options) -> None:
    """Composes and validates the configuration as the job will.

    Raises:
        ValueError: what is wrong with it, one problem per line.
    """
    sys.path.insert(0, str(options.working_dir))  # check the code that is uploaded, if it is ours
    from sae_rl.config.compose import load_config

    config = load_config(options.overrides)
    problems = [
        f"{key} = {path}: a job runs in a folder that Ray deletes; name an absolute path that every node sees"
        for key, path in {"output_dir": config.output_dir, "model.path": Path(config.model.path)}.items()
        if not path.is_absolute() and not (key == "model.path" and config.model.is_hub_name)
    ]
    if problems:
        raise ValueError("\n".join(problems))


def connect(address: str) -> JobSubmissionClient:
    """A client of the cluster whose dashboard is at ``address``.

    Raises:
        SubmitError: nothing answers there, it is no Ray, or it does not accept our token.
    """
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        os.environ.pop(name, None)  # Ray would take these instead of the address it is given
    if "RAY_AUTH_MODE" not in os.environ and _has_token():
        # `ray start` does so itself, Ray's HTTP client does not. Ray reads it when it is imported.
        os.environ["RAY_AUTH_MODE"] = "token"
    # EXCLUDES has them; Ray warns of each. Below a warning Ray tells every file it leaves out.
    os.environ.setdefault("RAY_OVERRIDE_RUNTIME_ENV_DEFAULT_EXCLUDES", "")
    logging.disable(logging.INFO)
    import requests
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        requests.get(f"{address}/api/version", timeout=CONNECT_TIMEOUT_S)  # the client below would wait for minutes
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise SubmitError(
            f"the cluster at {address} wants another token ({str(error).splitlines()[0]}). On its head, "
            "`launch/cluster.sh token` prints the token; put it into ~/.ray/auth_token or RAY_AUTH_TOKEN here"
        ) from error
    except (requests.RequestException, ConnectionError, RuntimeError) as error:
        raise SubmitError(
            f"no Ray cluster answers at {address} ({type(error).__name__}). Give its dashboard's address, port 8265 "
            "unless chosen otherwise; where that listens on the head only, open a tunnel with "
            "ssh -N -L 8265:127.0.0.1:8265 HEAD and give http://127.0.0.1:8265"
        ) from error


def _has_token() -> bool:
    named = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    return bool(named) or (Path.home() / ".ray" / "auth_token").is_file()


def submit(client: JobSubmissionClient, options: Options) -> str:
    """Uploads the working directory and starts the job; returns its id."""
    try:
        return client.submit_job(
            entrypoint=options.entrypoint,
            runtime_env=options.runtime_env,
            entrypoint_num_cpus=options.driver_cpus or None,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise SubmitError(f"the cluster refused the job: {error}") from error


async def print_log(client: JobSubmissionClient, job: str) -> None:
    """Prints the job's log until the job ends; takes a lost connection up again where it broke off."""
    import aiohttp

    printed, failures = 0, 0
    while True:
        received = 0
        try:
            async for text in client.tail_job_logs(job):
                print(text[max(0, printed - received) :], end="", flush=True)
                received += len(text)
                printed, failures = max(printed, received), 0
            if client.get_job_status(job).is_terminal():
                return
        except (RuntimeError, OSError, aiohttp.ClientError) as error:
            failures += 1
            if failures > MAX_RETRIES:
                raise SubmitError(f"lost the cluster while following {job} ({error}); the job may go on") from error
        await asyncio.sleep(RETRY_S)


def outcome(client: JobSubmissionClient, job: str) -> int:
    """The exit code of the job, which has ended; says what the log does not."""
    info = client.get_job_info(job)
    if info.status == "SUCCEEDED":
        return 0
    if info.driver_exit_code is None and info.message:
        print(info.message, file=sys.stderr)
    print(f"job {job} {info.status.lower()}", file=sys.stderr)
    return info.driver_exit_code or FAILURE


def stop(client: JobSubmissionClient, job: str) -> None:
    """Stops the job and waits until it has ended."""
    print(f"\nstopping job {job}, its last checkpoint stays", file=sys.stderr)
    client.stop_job(job)
    deadline = time.monotonic() + STOP_WAIT_S + 10
    while not client.get_job_status(job).is_terminal() and time.monotonic() < deadline:
        time.sleep(1)


def by_hand(options: Options, action: str, job: str) -> str:
    """The command that does ``action`` to the job; Ray's command line needs to be told that there is a token."""
    mode = "RAY_AUTH_MODE=token " if os.environ.get("RAY_AUTH_MODE") == "token" else ""
    return f"{mode}ray job {action} --address {options.address} {job}"


def run(options: Options) -> int:
    if options.check:
        try:
            check_run(options)
        except ValueError as error:
            lines = "\n".join(f"error: {line}" for line in str(error).splitlines())
            print(f"{lines}\n(nothing was submitted; --no-check leaves the check to the cluster)", file=sys.stderr)
            return USAGE_ERROR
    client = connect(options.address)
    job = submit(client, options)
    print(f"job {job} on {options.address}: {options.entrypoint.removeprefix('exec ')}", flush=True)
    if not options.follow:
        print(f"follow it: {by_hand(options, 'logs --follow', job)}\nstop it:   {by_hand(options, 'stop', job)}")
        return 0
    try:
        asyncio.run(print_log(client, job))
    except KeyboardInterrupt:
        if options.stop_on_interrupt:
            stop(client, job)
        else:
            follow, end = by_hand(options, "logs --follow", job), by_hand(options, "stop", job)
            print(f"\njob {job} goes on\nfollow it: {follow}\nstop it:   {end}", file=sys.stderr)
        return INTERRUPTED
    return outcome(client, job)


def main() -> None:
    try:
        sys.exit(run(parse(sys.argv[1:], os.environ)))
    except SubmitError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(FAILURE)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
