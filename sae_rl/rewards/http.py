"""A verifier that is a service."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from sae_rl.knobs import Knobs, integer, number
from sae_rl.rewards.verdict import Sample, TimeLimit, Verdict, shown

if TYPE_CHECKING:
    import httpx

MAX_SHOWN = 200  # characters of a reply that an error shows


@cache
def client() -> httpx.Client:
    """The client of this process, which keeps its connections open."""
    import httpx

    return httpx.Client()


@dataclass(frozen=True, slots=True)
class Http(Knobs):
    """What a service replies to ``{"prompt", "response", "answer"}``: ``{"score", "why"?, "answer"?}``.

    Question and reply are JSON. A failed connection, a late reply and a status of 500 or more are retried after
    ``backoff_s``, twice that, and so on.
    """

    url: str
    timeout_s: float = number(3.0, low=0, above_low=True)  # for one request
    retries: int = integer(2, low=0)
    backoff_s: float = number(0.25, low=0)

    def check_together(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"Http.url = {self.url!r}, but it must begin with http:// or https://")

    def time_limit(self) -> TimeLimit:
        waits_s = self.backoff_s * (2**self.retries - 1)
        return TimeLimit((self.retries + 1) * self.timeout_s + waits_s, "timeout_s, retries and backoff_s")

    def __call__(self, sample: Sample) -> Verdict:
        """Raises ConnectionError for a status other than 200 or no reply, and ValueError if the reply is not a verdict."""
        return self._verdict(self._reply(sample))

    def _reply(self, sample: Sample) -> httpx.Response:
        import httpx

        question, problem = {"prompt": sample.prompt, "response": sample.response, "answer": sample.answer}, ""
        for attempt in range(self.retries + 1):
            time.sleep(self.backoff_s * 2 ** (attempt - 1) if attempt else 0.0)
            try:
                reply = client().post(self.url, json=question, timeout=self.timeout_s)
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
                continue
            if reply.status_code == httpx.codes.OK:
                return reply
            problem = f"status {reply.status_code}: {shown(reply.text, MAX_SHOWN)}"
            if reply.status_code < httpx.codes.INTERNAL_SERVER_ERROR:
                raise ConnectionError(f"http: {self.url} replied with {problem}")
        raise ConnectionError(f"http: {self.url} failed {self.retries + 1} times, the last time with {problem}")

    def _verdict(self, reply: httpx.Response) -> Verdict:
        try:
            said = reply.json()
        except ValueError:
            raise ValueError(f"http: {self.url} replied {shown(reply.text, MAX_SHOWN)}, which is not JSON") from None
        if not isinstance(said, dict) or "score" not in said:
            raise ValueError(f"http: {self.url} replied {shown(repr(said), MAX_SHOWN)}, which has no score")
        score, why, answer = said["score"], said.get("why", f"{self.url} says so"), said.get("answer")
        if isinstance(score, bool) or not isinstance(score, int | float):
            raise ValueError(f"http: {self.url} replied with score = {score!r}, which is not a number")
        for key, text in (("why", why), ("answer", answer)):
            if not isinstance(text, str) and (key == "why" or text is not None):
                raise ValueError(f"http: {self.url} replied {key} = {shown(repr(text), MAX_SHOWN)}, which is not text")
        return Verdict(float(score), why, answer)
