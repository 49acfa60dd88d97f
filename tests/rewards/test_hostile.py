"""Model-written programs against the sandbox, with each isolation that works on this machine."""

from __future__ import annotations

import contextlib
import json
import multiprocessing.util
import os
import re
import secrets
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import psutil
import pytest

from sae_rl.rewards.code import Code
from sae_rl.rewards.verdict import Failed, Sample, Verdict
from sae_rl.sandbox.isolation import FIRST_USER, NUM_USERS, Isolation
from sae_rl.sandbox.probe import CHOSEN, chosen, problem_with

from .hostile import FUNCTIONS, HOSTILE
from .test_pool import make_pool, rollout, score

pytestmark = pytest.mark.alone  # it looks at all processes of the machine
TIME_S = 1.5
ENDS_S = 5.0  # what starting and ending a sandbox may take beyond that, several at a time on a busy machine
NUM_PROCESSES = 4
LEFT_BEHIND = (Path("/tmp/sae_rl_hostile"), Path("/dev/shm/sae_rl_hostile"))


@dataclass
class Surroundings:
    """What hostile programs look for, and what must not change."""

    secret: str
    outside: Path
    answers: Path
    port: int
    asked: list[object]  # by connections to the server

    def known(self) -> list[object]:
        """Of the files that are not theirs, beside what they hold."""
        paths = [self.outside, self.outside / "kept", self.answers]
        return [(p.stat().st_mode, p.stat().st_size, p.stat().st_mtime_ns, os.listxattr(p)) for p in paths]

    def fill(self, source: str, pid: str = str(os.getpid())) -> str:
        for name, value in {
            "@OUTSIDE@": self.outside,
            "@ANSWERS@": self.answers,
            "@PORT@": self.port,
            "@PID@": pid,
        }.items():
            source = source.replace(name, str(value))
        return source


@pytest.fixture(params=get_args(Isolation))
def isolation(request: pytest.FixtureRequest) -> Iterator[Isolation]:
    """Each isolation that works on this machine, as if it had been chosen."""
    if (problem := problem_with(request.param)) is not None:
        pytest.skip(f"{request.param}: {problem}")
    before = list(CHOSEN)
    CHOSEN[:] = [request.param]
    yield request.param
    CHOSEN[:] = before


def test_an_isolation_works_here() -> None:
    assert chosen() in get_args(Isolation)


@pytest.fixture
def around(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Surroundings]:
    secret = f"secret-{secrets.token_hex(8)}"
    monkeypatch.setenv("SAE_RL_SECRET", secret)
    outside, answers, temporary = tmp_path / "outside", tmp_path / "answers.txt", tmp_path / "temporary"
    outside.mkdir()
    temporary.mkdir()
    multiprocessing.util.get_temp_dir()  # the library's own, made at its first use, lives as long as this process
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    (outside / "kept").write_text("kept")
    answers.write_text(secret)
    for path in (*(p for p in tmp_path.parents if p.stat().st_uid == os.geteuid()), tmp_path, outside, temporary):
        path.chmod(path.stat().st_mode | (0o055 if path not in (outside, temporary) else 0o777))
    asked: list[object] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, address = server.accept()
                    asked.append(address)
                    with connection:
                        connection.sendall(secret.encode())

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield Surroundings(secret, outside, answers, server.getsockname()[1], asked)
        server.shutdown(socket.SHUT_RDWR)
        thread.join(5)


@pytest.fixture(autouse=True)
def nothing_left(around: Surroundings) -> Iterator[None]:
    """No process, no file, no connection, and what others had is as it was."""
    before, known = (started_by_sandboxes(), sorted(os.listdir(around.outside.parent))), around.known()
    yield
    assert started_by_sandboxes() - before[0] == set()
    assert sorted(os.listdir(around.outside.parent)) == before[1]
    assert os.listdir(around.outside) == ["kept"] and (around.outside / "kept").read_text() == "kept"
    assert around.known() == known
    assert os.listdir(tempfile.gettempdir()) == []
    assert not any(path.exists() for path in LEFT_BEHIND)
    assert around.asked == [], "a program reached a server"


def started_by_sandboxes() -> set[str]:
    """Processes that are still there, zombies included."""
    found = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            is_sandboxed = FIRST_USER <= process.uids().real < FIRST_USER + NUM_USERS
            if is_sandboxed or "inside.py" in " ".join(process.cmdline()):
                found.add(f"{process.pid} {process.status()} {' '.join(process.cmdline())[:80]}")
    return found


def unit_tests(function: bool, secret: str) -> str:
    if function:
        return json.dumps({"fn_name": "f", "inputs": [[1]], "outputs": [secret]})
    return json.dumps({"inputs": ["1\n"], "outputs": [secret]})


STRICT = Code(time_s=TIME_S, total_s=TIME_S, memory_mb=256)


def check_here(source: str, around: Surroundings, function: bool = False) -> Verdict:
    return STRICT(
        Sample(prompt="", response=f"```python\n{around.fill(source)}\n```", answer=unit_tests(function, around.secret))
    )


@pytest.mark.usefixtures("isolation")
def test_hostile_programs_get_nothing_and_delay_nobody(around: Surroundings) -> None:
    """All at once, as a batch of a run, with honest ones among them."""
    honest = {f"honest {i}": f"print({around.secret!r})" for i in range(4)}
    programs = [(name, source, False) for name, source in (HOSTILE | honest).items()]
    programs += [(name, source, True) for name, source in FUNCTIONS.items()]
    rollouts = [
        rollout(
            "code", name, response=f"```python\n{around.fill(source)}\n```", answer=unit_tests(function, around.secret)
        )
        for name, source, function in programs
    ]
    started = time.monotonic()
    with make_pool(
        num_processes=NUM_PROCESSES, deadline_s=TIME_S + ENDS_S, memory_gb=2.0, verifiers={"code": STRICT}
    ) as pool:
        outcomes = score(pool, rollouts).outcomes
    took_s = time.monotonic() - started
    told = {name: outcome for (name, *_), outcome in zip(programs, outcomes, strict=True)}
    assert {name: each for name, each in told.items() if isinstance(each, Failed)} == {}
    scored = {name for name, each in told.items() if isinstance(each, Verdict) and each.score != 0.0}
    assert scored == honest.keys()
    found = {name: re.sub("expected .*?, found", "", each.why) for name, each in told.items()}
    assert {name for name, text in found.items() if around.secret in text} == set()
    assert took_s < len(programs) / NUM_PROCESSES * (TIME_S + 1.0) + 10, "nobody waits longer than for the time limits"


@pytest.mark.usefixtures("isolation")
@pytest.mark.parametrize("name", [name for name in HOSTILE if "folders" in name or "paths" in name])
def test_folders_of_any_shape_are_removed(name: str, around: Surroundings) -> None:
    assert "found 'x'" in check_here(HOSTILE[name], around).why


FILES = """
import os, time
for i in range(20):
    with open(f'{os.environ["TMPDIR"]}/f{i}', 'wb') as file: file.write(b'1' * (4 << 20))
    time.sleep(0.05)
print(%r)"""


@pytest.mark.usefixtures("isolation")
def test_what_a_folder_holds_is_limited_as_a_whole(around: Surroundings) -> None:
    verdict = check_here(FILES % around.secret, around)
    assert verdict.score == 0.0
    assert "No space left" in verdict.why


@pytest.mark.usefixtures("isolation")
@pytest.mark.parametrize("name", [name for name in HOSTILE if "environment" in name or "checker" in name])
def test_the_process_that_checks_gives_nothing_away(name: str, around: Surroundings) -> None:
    """Here that is this process, which knows the secret and has it in its environment."""
    assert check_here(HOSTILE[name], around).score == 0.0


@pytest.mark.usefixtures("isolation")
def test_an_honest_program_scores(around: Surroundings) -> None:
    """What the tests above refuse is not refused for another reason."""
    assert check_here(f"print({around.secret!r})", around).score == 1.0
    assert check_here(f"def f(x): return {around.secret!r}", around, function=True).score == 1.0


AS_NOBODY = """
import json, os, sys, threading, time
from typing import get_args
from sae_rl.sandbox.isolation import Isolation
from sae_rl.sandbox.isolation import Limits
from sae_rl.sandbox.probe import problem_with
from sae_rl.sandbox.programs import run_program

for _ in range(40):  # processes and threads of the user that are none of the program's
    threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
programs, told, limits = json.loads(sys.stdin.read()), {}, Limits(time_s=1.5, memory_mb=256)
for isolation in get_args(Isolation):
    told[isolation] = {"": problem_with(isolation) or ""}
    for name, source in programs.items() if not told[isolation][""] else ():
        source = source.replace("@PID@", str(os.getpid()))
        ended = run_program(source, [""], limits=limits, isolation=isolation, total_s=2.0)
        told[isolation][name] = str(ended.answers)
print(json.dumps(told))
"""
# What a user's own processes and files have to fear, beside what is tested above.
WITHOUT_RIGHTS = [
    *("writes outside", "deletes outside", "moves a file of others", "reads the answers", "searches the disk"),
    *("reads its parent's environment", "reads the checker's environment", "reads the checker's memory"),
    *("asks a server", "kills whoever checks", "stops whoever checks", "lowers the checker's limits", "daemon"),
    *("fork bomb", "thread bomb", "makes namespaces", "debugs the checker", "changes its own checker"),
    *("deep folders", "paths that are too long", "folders that cannot be entered"),
    *("signals the checker through a socket", "changes what is known of a file of others"),
]


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_started_by_a_user_without_rights(around: Surroundings) -> None:
    """As on a cluster where nobody is root; with a Python that this user may run."""
    python = next((p for p in ("/usr/bin/python3.12", "/usr/bin/python3.11") if os.path.exists(p)), None)
    if python is None:
        pytest.skip("no Python of the system")
    for path in (around.outside, around.outside / "kept"):
        os.chown(path, 65534, 65534)
    programs = {name: around.fill(HOSTILE[name], pid="@PID@") for name in WITHOUT_RIGHTS}
    threaded = f"import threading\nthreading.Thread(target=lambda: print({around.secret!r})).start()"
    honest = {"honest": f"print({around.secret!r})", "honest with a thread": threaded}
    environment = {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "SAE_RL_SECRET": around.secret,
        "PATH": os.environ["PATH"],
        "TMPDIR": tempfile.gettempdir(),
    }
    done = subprocess.run(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", python, "-B", "-c", AS_NOBODY],
        input=json.dumps(programs | honest),
        env=environment,
        cwd="/",
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert any(not outputs[""] for outputs in told.values()), told
    for isolation, outputs in told.items():
        if not outputs[""]:
            assert {name for name, text in outputs.items() if around.secret in text} == honest.keys(), isolation
            assert len(outputs) == len(programs) + len(honest) + 1
