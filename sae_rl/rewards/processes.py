"""Processes that check, each check under a deadline; where they die or stop working, they are started again."""

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
LOOK_S = 0.5  # between looks at whether the processes still work
STUCK_S = 60.0  # beyond the deadline, without any check that ends: for processes to start and to be killed
MAX_STARTS = 3  # in a row without any check that ends

Question = tuple[bytes, Sample]  # what `check.check` is given


class Processes:
    """A few processes that check, for as long as `stop` is not called.

    pebble kills a process at the deadline and replaces it, but gives all up when one dies while none checks: the kernel may
    kill any when memory is short. Then others are started, and what they had not answered is asked again.

    Args:
        start: its arguments, see `check.start`.
    """

    def __init__(self, num_processes: int, deadline_s: float, start: tuple[str, int, tuple[bytes, ...]]) -> None:
        self._num_processes, self._deadline_s, self._start = num_processes, deadline_s, start
        # Not forked from here: the driver has threads of Ray and torch, whose locks a fork would copy as they stand. The
        # server that forks has imported and parsed what checks need, so that a killed process is replaced in milliseconds.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([in_process.__name__, "sae_rl.rewards.math.expressions"])
        self._asked: dict[Future[Verdict | Failed], Question] = {}  # not answered yet
        self._starting = threading.Lock()
        self._num_starts, self._last_end = 0, time.monotonic()
        self._pool = self._new_pool()

    def _new_pool(self) -> ProcessPool:
        return ProcessPool(
            max_workers=self._num_processes,
            context=self._context,
            initializer=in_process.start,
            initargs=self._start,
        )

    def ask(self, questions: Iterable[Question]) -> list[Future[Verdict | Failed]]:
        """As soon as a process is free."""
        asked = {Future[Verdict | Failed](): question for question in questions}
        with self._starting:
            pool = self._pool
            self._asked |= asked
            is_working = self._schedule(pool, asked)
        if not is_working:
            self._start_again(pool)
        return list(asked)

    def _schedule(self, pool: ProcessPool, asked: Iterable[Future[Verdict | Failed]]) -> bool:
        """Whether the pool takes them."""
        try:
            for future in asked:
                inner = pool.schedule(in_process.check, args=self._asked[future], timeout=self._deadline_s)
                inner.add_done_callback(partial(self._ended, future))
        except RuntimeError:  # it has given up
            return False
        return True

    def _ended(self, future: Future[Verdict | Failed], inner: ProcessFuture[Verdict | Failed]) -> None:
        error = inner.exception()
        if isinstance(error, BrokenProcessPool) or self._asked.pop(future, None) is None:
            return  # it will be asked again, or has been answered
        self._num_starts, self._last_end = 0, time.monotonic()
        if error is None:
            future.set_result(inner.result())
        else:
            future.set_exception(error)

    def wait(self, future: Future[Verdict | Failed]) -> None:
        """For its answer.

        Raises:
            RuntimeError: the processes die as often as they are started.
        """
        began = time.monotonic()
        while not future.done():
            wait([future], LOOK_S)
            pool, quiet_s = self._pool, time.monotonic() - max(began, self._last_end)
            if not future.done() and (not pool.active or quiet_s > self._deadline_s + STUCK_S):
                self._start_again(pool)
                began = time.monotonic()

    def _start_again(self, broken: ProcessPool) -> None:
        with self._starting:
            while self._pool is broken:
                if self._num_starts == MAX_STARTS:
                    raise RuntimeError(
                        f"reward processes stopped working {MAX_STARTS + 1} times in a row before a check ended: does the "
                        "machine run out of memory, or is rewards.memory_gb less than they need to start?"
                    )
                time.sleep(self._num_starts)  # what keeps them from starting may pass
                self._num_starts += 1
                logger.warning(
                    "reward processes stopped working (one was killed from outside, or could not start); starting others, "
                    "which do %d checks again",
                    len(self._asked),
                )
                self._end(broken)
                self._pool = self._new_pool()
                if not self._schedule(self._pool, list(self._asked)):
                    broken = self._pool

    def stop(self) -> None:
        """Ends all processes, whatever they are doing."""
        self._end(self._pool)

    @staticmethod
    def _end(pool: ProcessPool) -> None:
        pool.stop()
        pool.join()
