"""The verifier behind a URL, against a server of our own on this machine."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from sae_rl.rewards.http import Http, client
from sae_rl.rewards.verdict import Sample, Verdict

SAMPLE = Sample(prompt="2 + 2?", response="vier: 4", answer="4")
Reply = Callable[[dict[str, Any], int], tuple[int, bytes]]


class Server:
    """Replies as the test says; remembers what it was asked."""

    def __init__(self) -> None:
        self.reply: Reply = lambda question, attempt: (200, b"{}")
        self.questions: list[dict[str, Any]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            timeout = 5.0

            def do_POST(self) -> None:
                question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.questions.append(question)
                status, body = server.reply(question, len(server.questions))
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None: ...

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/judge"

    def says(self, said: object, status: int = 200) -> None:
        body = said if isinstance(said, bytes) else json.dumps(said).encode()
        self.reply = lambda question, attempt: (status, body)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    client.cache_clear()
    made = Server()
    thread = threading.Thread(target=made.http.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield made
    client().close()
    client.cache_clear()
    made.http.shutdown()
    made.http.server_close()
    thread.join(timeout=10)
    assert not thread.is_alive()


def http(server: Server, **knobs: Any) -> Http:
    return Http(server.url, **({"timeout_s": 5.0, "backoff_s": 0.01} | knobs))


def test_it_asks_and_reads_the_verdict(server: Server) -> None:
    server.says({"score": 0.5, "why": "half", "answer": "4"})
    assert http(server)(SAMPLE) == Verdict(0.5, "half", "4")
    assert server.questions == [{"prompt": "2 + 2?", "response": "vier: 4", "answer": "4"}]
    server.says({"score": 1})
    assert http(server)(SAMPLE) == Verdict(1.0, f"{server.url} says so", None)


def test_what_passes_is_tried_again(server: Server) -> None:
    server.reply = lambda question, attempt: (503, b"busy") if attempt < 3 else (200, b'{"score": 1}')
    assert http(server, retries=2)(SAMPLE).score == 1.0
    assert len(server.questions) == 3
    with pytest.raises(ConnectionError, match=r"failed 1 times, the last time with status 503: 'busy'"):
        server.says(b"busy", status=503)
        http(server, retries=0)(SAMPLE)


def test_what_stays_is_not_tried_again(server: Server) -> None:
    server.says(b"no such route", status=404)
    with pytest.raises(ConnectionError, match=r"replied with status 404: 'no such route'"):
        http(server)(SAMPLE)
    assert len(server.questions) == 1


def test_nobody_listens(server: Server) -> None:
    started = time.monotonic()
    with pytest.raises(ConnectionError, match=r"failed 3 times, the last time with ConnectError"):
        Http("http://127.0.0.1:9/judge", retries=2, backoff_s=0.01)(SAMPLE)
    assert time.monotonic() - started < 10


def test_a_late_reply(server: Server) -> None:
    def late(question: dict[str, Any], attempt: int) -> tuple[int, bytes]:
        time.sleep(0.5 if attempt == 1 else 0.0)
        return 200, b'{"score": 1}'

    server.reply = late
    assert http(server, timeout_s=0.2, retries=1)(SAMPLE).score == 1.0
    assert len(server.questions) == 2


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (b"<html>oops</html>", "replied '<html>oops</html>', which is not JSON"),
        ([1], "which has no score"),
        ({"skore": 1}, "which has no score"),
        ({"score": "1"}, "score = '1', which is not a number"),
        ({"score": None}, "score = None, which is not a number"),
        ({"score": True}, "score = True, which is not a number"),
        ({"score": 1, "why": 3}, "why = '3', which is not text"),
        ({"score": 1, "answer": 4}, "answer = '4', which is not text"),
    ],
)
def test_a_reply_that_is_no_verdict_says_what_came_back(server: Server, said: object, message: str) -> None:
    server.says(said)
    with pytest.raises(ValueError, match=message):
        http(server)(SAMPLE)


def test_bad_knobs() -> None:
    for knobs, message in (
        ({"url": "localhost:80"}, "Http.url = 'localhost:80', but it must begin with http://"),
        ({"url": "http://a", "timeout_s": 0}, "Http.timeout_s = 0"),
        ({"url": "http://a", "retries": -1}, "Http.retries = -1"),
        ({"url": "http://a", "backoff_s": float("nan")}, "Http.backoff_s = nan"),
    ):
        with pytest.raises(ValueError, match=message):
            Http(**knobs)  # type: ignore[arg-type]


def test_the_service_that_the_page_of_the_sandbox_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    client.cache_clear()
    page = (Path(__file__).parents[2] / "docs" / "sandbox.md").read_text()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    source = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0].replace('("", 8080)', f'("127.0.0.1", {port})')
    service = tmp_path / "judge.py"
    service.write_text(source)
    process = subprocess.Popen([sys.executable, str(service)], stderr=subprocess.DEVNULL)
    try:
        judge = Http(f"http://127.0.0.1:{port}", timeout_s=20.0, retries=8)
        tests = json.dumps({"inputs": ["1 2"], "outputs": ["3"]})
        for operator, score in (("+", 1.0), ("-", 0.0)):
            program = f"```python\na, b = map(int, input().split())\nprint(a {operator} b)\n```"
            verdict = judge(Sample(prompt="Add.", response=program, answer=tests))
            assert verdict.score == score
        assert verdict.why == "0 of 1 tests pass; test 1: line 1: expected '3', found '-1'"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(10)
        client().close()
        client.cache_clear()
