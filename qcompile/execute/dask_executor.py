"""An executor on dask.distributed: a cluster that is there, or one of local processes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from qcompile.errors import BackendError, QcompileError, UsageError
from qcompile.execute.executor import Merge, OnTask

T = TypeVar("T")
R = TypeVar("R")
FAN_IN = 4
CONNECT_SECONDS = 30
MISSING = "--dask needs the package distributed; install it with: pip install 'qcompile[dask]'"


class DaskExecutor:
    """Tasks on a cluster; results are merged there in groups of `FAN_IN` before they travel.

    `address` is tcp://host:port of a scheduler, `local`, or `local:N` for N processes on this machine.
    """

    def __init__(self, address: str, threads: int | None = None) -> None:
        self._cluster: Any = None
        self._client: Any = None
        try:
            import distributed
        except ImportError as e:
            raise BackendError(MISSING) from e
        if address.partition(":")[0] == "local":
            self._cluster = _local_cluster(distributed, address)
            address = self._cluster.scheduler_address
        try:
            self._client = distributed.Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
            self._client.wait_for_workers(1, timeout=CONNECT_SECONDS)
        except (OSError, TimeoutError, ValueError) as e:
            self.close()
            raise BackendError(f"no dask scheduler with workers answers at {address} ({e}); start one, or use --workers N") from e

    @property
    def workers(self) -> int:
        return max(1, len(self._client.scheduler_info(n_workers=-1)["workers"]))

    def results(
        self, function: Callable[[T], R], tasks: Sequence[T], merge: Merge[R] | None = None, on_task: OnTask | None = None
    ) -> Iterator[tuple[tuple[int, ...], R]]:
        from distributed import as_completed

        leaves = [self._client.submit(function, task, pure=False) for task in tasks]
        if on_task is not None:
            for i, leaf in enumerate(leaves):
                leaf.add_done_callback(lambda future, i=i: on_task(i) if future.status == "finished" else None)
        groups = self._groups(leaves, merge)
        del leaves  # a result is let go of as soon as its group is merged
        try:
            for future in as_completed(list(groups), loop=self._client.loop):
                yield groups.pop(future), _result(future)
        finally:
            self._client.cancel(list(groups))

    def close(self) -> None:
        for part in (self._client, self._cluster):
            if part is not None:
                with contextlib.suppress(Exception):
                    part.close()

    def _groups(self, leaves: list[Any], merge: Merge[Any] | None) -> dict[Any, tuple[int, ...]]:
        """A future for every `FAN_IN` neighbours."""
        if merge is None:
            return {leaf: (i,) for i, leaf in enumerate(leaves)}
        groups: dict[Any, tuple[int, ...]] = {}
        for start in range(0, len(leaves), FAN_IN):
            members = leaves[start : start + FAN_IN]
            joined = members[0] if len(members) == 1 else self._client.submit(merge, members, pure=False)
            groups[joined] = tuple(range(start, start + len(members)))
        return groups


def _local_cluster(distributed: Any, address: str) -> Any:
    _, _, count = address.partition(":")
    if count and (not count.isdigit() or int(count) < 1):
        raise UsageError(f"--dask {address}: give a number of processes, as in local:4")
    return distributed.LocalCluster(
        n_workers=int(count) if count else None,
        threads_per_worker=1,
        processes=True,
        dashboard_address="127.0.0.1:0",
        silence_logs=50,
    )


def _result(future: Any) -> Any:
    try:
        return future.result()
    except QcompileError:
        raise
    except Exception as e:  # distributed's own: lost connections, workers that die again and again
        raise BackendError(
            f"the cluster lost a task ({type(e).__name__}: {str(e).splitlines()[0][:200]}); look at its workers' logs and memory,"
            " then run the same command again: what is done is kept"
        ) from e
