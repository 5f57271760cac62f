"""Executors: one way to spread tasks over processes or machines, whoever dies on the way.

A task is a module-level function and one picklable value; what it returns must not depend on where or how often it ran.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol, TypeVar

from qcompile.errors import BackendError

T = TypeVar("T")
R = TypeVar("R")
Merge = Callable[[list[R]], R]
OnTask = Callable[[int], None]

MAX_LOSSES = 20


class Executor(Protocol):
    """Where tasks run."""

    @property
    def workers(self) -> int:
        """How many tasks run at the same time."""
        ...

    def results(
        self, function: Callable[[T], R], tasks: Sequence[T], merge: Merge[R] | None = None, on_task: OnTask | None = None
    ) -> Iterator[tuple[tuple[int, ...], R]]:
        """(indices of the tasks, their result) as they come.  Tasks of lost workers run again.

        Args:
            merge: joins results of several tasks; an executor may use it to send back fewer of them.
            on_task: told the index of each task that is done, perhaps from another thread.

        Raises:
            BackendError: workers cannot be reached, or die again and again.
        """
        ...

    def close(self) -> None:
        """End the workers that this executor started."""
        ...


class ProcessExecutor:
    """Processes on this machine, started afresh (no fork), replaced when they die."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._pool = self._start()

    @property
    def workers(self) -> int:
        return self._workers

    def results(
        self, function: Callable[[T], R], tasks: Sequence[T], merge: Merge[R] | None = None, on_task: OnTask | None = None
    ) -> Iterator[tuple[tuple[int, ...], R]]:
        left, losses = dict(enumerate(tasks)), 0
        while left:
            pending = self._submit(function, left)
            try:
                for index, result in _completed(pending):
                    del left[index]
                    if on_task is not None:
                        on_task(index)
                    yield (index,), result
            except BrokenProcessPool as e:
                losses += 1
                if losses > MAX_LOSSES:
                    raise BackendError(f"worker processes died {losses} times; is memory short? Give fewer --workers") from e
                self._restart()

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _submit(self, function: Callable[[T], R], left: dict[int, T]) -> dict[Future[R], int]:
        try:
            return {self._pool.submit(function, task): index for index, task in left.items()}
        except BrokenProcessPool:  # a worker died while nothing ran
            self._restart()
            return {self._pool.submit(function, task): index for index, task in left.items()}

    def _start(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(self._workers, multiprocessing.get_context("spawn"), initializer=_die_with_parent)

    def _restart(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._pool = self._start()


def _completed(pending: dict[Future[R], int]) -> Iterator[tuple[int, R]]:
    """As they come; results that are there are given out before a broken pool is reported."""
    waiting = set(pending)
    while waiting:
        done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
        broken: BaseException | None = None
        for future in done:
            error = future.exception()
            if isinstance(error, BrokenProcessPool):
                broken = error
            elif error is not None:
                for other in waiting:
                    other.cancel()
                raise error
            else:
                yield pending[future], future.result()
        if broken is not None:
            raise broken


def _die_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent: Any = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
