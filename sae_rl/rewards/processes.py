"""The processes of the reward pool: a check that exceeds its deadline is killed, and processes that die are replaced."""

from __future__ import annotations

import logging
import multiprocessing
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial

from pebble import ProcessFuture, ProcessPool

from sae_rl.rewards import check as in_process
from sae_rl.rewards.verdict import Failed, Sample, Verdict

logger = logging.getLogger(__name__)
LOOK_S = 0.5  # how often a waiting thread looks whether the processes still work
STUCK_S = 60.0  # no check ended for this time beyond the deadline: the processes do not work
MAX_STARTS = 3  # restarts in a row before any check ends

Question = tuple[bytes, Sample]  # the arguments of `check.check`


class Processes:
    """A pebble pool that is replaced when it breaks.

    pebble kills a process at the deadline of its check and starts another one. But the whole pool breaks when a process dies
    that was not checking anything, as when the kernel kills it for want of memory. Then a new pool gets all questions that
    have no answer yet.

    Args:
        start: the arguments of `check.start`.
    """

    def __init__(self, num_processes: int, deadline_s: float, start: tuple[str, int, tuple[bytes, ...]]) -> None:
        self._num_processes, self._deadline_s, self._start = num_processes, deadline_s, start
        # The driver is not forked, since its threads of Ray and torch may hold locks. The server that is forked has imported
        # everything that checks need, so that a killed process is replaced in milliseconds.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([in_process.__name__, "sae_rl.rewards.math.expressions"])
        self._unanswered: dict[Future[Verdict | Failed], Question] = {}
        self._lock = threading.Lock()  # guards the pool, and how often it was replaced
        self._num_starts, self._last_end = 0, time.monotonic()
        self._pool = self._new_pool()

    def _new_pool(self) -> ProcessPool:
        return ProcessPool(self._num_processes, 0, in_process.start, self._start, self._context)

    def ask(self, questions: Iterable[Question]) -> list[Future[Verdict | Failed]]:
        """Starts checks, each as soon as a process is free."""
        asked = {Future[Verdict | Failed](): question for question in questions}
        with self._lock:
            pool = self._pool
            self._unanswered |= asked
            is_working = self._schedule(pool, asked)
        if not is_working:
            self._replace(pool)
        return list(asked)

    def _schedule(self, pool: ProcessPool, asked: Iterable[Future[Verdict | Failed]]) -> bool:
        """Passes questions to a pool. Returns whether the pool still works."""
        try:
            for future in asked:
                inner = pool.schedule(in_process.check, args=self._unanswered[future], timeout=self._deadline_s)
                inner.add_done_callback(partial(self._on_answer, future))
        except RuntimeError:  # pebble's, of a broken pool
            return False
        return True

    def _on_answer(self, future: Future[Verdict | Failed], inner: ProcessFuture[Verdict | Failed]) -> None:
        error = inner.exception()
        if isinstance(error, BrokenProcessPool) or self._unanswered.pop(future, None) is None:
            return  # it will be asked again, or has been answered already
        self._num_starts, self._last_end = 0, time.monotonic()
        if error is None:
            future.set_result(inner.result())
        else:
            future.set_exception(error)

    def wait(self, future: Future[Verdict | Failed]) -> None:
        """Waits for an answer. Raises RuntimeError if the processes die whenever they are started."""
        began = time.monotonic()
        while not future.done():
            wait([future], LOOK_S)
            pool, quiet_s = self._pool, time.monotonic() - max(began, self._last_end)
            if not future.done() and (not pool.active or quiet_s > self._deadline_s + STUCK_S):
                self._replace(pool)
                began = time.monotonic()

    def _replace(self, broken: ProcessPool) -> None:
        """Starts a new pool, unless another thread has replaced the broken one, and asks it everything that is unanswered."""
        with self._lock:
            while self._pool is broken:
                if self._num_starts == MAX_STARTS:
                    raise RuntimeError(
                        f"reward processes stopped working {MAX_STARTS + 1} times in a row before a check ended: does the "
                        "machine run out of memory, or is rewards.memory_gb less than they need to start?"
                    )
                time.sleep(self._num_starts)  # what kept them from starting may pass
                self._num_starts += 1
                logger.warning(
                    "reward processes stopped working (one was killed from outside, or could not start); starting others, "
                    "which do %d checks again",
                    len(self._unanswered),
                )
                self.stop()
                self._pool = self._new_pool()
                if not self._schedule(self._pool, list(self._unanswered)):
                    broken = self._pool

    def stop(self) -> None:
        """Ends all processes, whatever they are doing."""
        self._pool.stop()
        self._pool.join()
