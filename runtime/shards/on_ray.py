"""Workers as actors of a Ray cluster, which starts them again elsewhere when they or their machines die."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

from ddexport.runtime.backends import Configuration
from ddexport.runtime.errors import BackendError, DDError
from ddexport.runtime.shards.local import Shard
from ddexport.runtime.shards.worker import Task, Worker, configuration

CONNECT_SECONDS = 5
LOCAL = "local"  # in place of an address: a cluster of this machine alone, for as long as the command runs


@contextmanager
def cluster(address: str) -> Iterator[Any]:
    """Ray, connected to a cluster. Raises BackendError."""
    # Nothing is reported to Ray's makers, and a cluster of our own writes no token under HOME.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address == LOCAL:
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    import ray

    where = {"include_dashboard": False} if address == LOCAL else {"address": address}
    with redirect_stdout(sys.stderr):  # Ray prints what its processes say, and stdout is for the report
        try:
            if ":" in address:  # Ray itself tries for minutes
                host, _, port = address.removeprefix("ray://").rpartition(":")
                socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
            ray.init(logging_level="warning", **where)
        except (OSError, RuntimeError, ValueError) as error:
            hint = "Give --ray local, or the address of a cluster."
            raise BackendError(f"no Ray cluster at {address}: {error}", hint) from error
        try:
            yield ray
        finally:
            ray.shutdown()


def resources(task: Task) -> dict[str, int]:
    """What a worker takes."""
    on_gpu = str(task.engine["device"]).startswith("cuda")
    return {"num_cpus": task.engine["threads"], "num_gpus": int(on_gpu)}


def configured(ray: Any, task: Task) -> Configuration:
    """The engine that would run on a machine of the cluster. Raises DDError."""
    with _explained(ray):
        chosen = ray.get(ray.remote(**resources(task))(configuration).remote(task))
    assert isinstance(chosen, Configuration)
    return chosen


def draw(ray: Any, task: Task, shards: Sequence[Shard], workers: int | None) -> Iterator[int]:
    """Draws shards in so many actors, as many as fit the cluster if None. Yields the number of images of
    every shard. Raises DDError."""
    from ray.util import ActorPool

    share, total = resources(task), ray.cluster_resources()
    fit = min(int(total.get(name[4:-1].upper(), 0)) // n for name, n in share.items() if n)
    count = min(workers or max(1, fit), len(shards))
    actor = ray.remote(max_restarts=-1, max_task_retries=-1, **share)(Worker)
    with _explained(ray):
        pool = ActorPool([actor.remote(task) for _ in range(count)])
        yield from pool.map_unordered(lambda worker, shard: worker.draw_whole.remote(*shard), shards)


@contextmanager
def _explained(ray: Any) -> Iterator[None]:
    """Raises what a worker raised, and BackendError where Ray fails."""
    try:
        yield
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, DDError):
            raise cause from None
        raise BackendError(f"Ray failed: {error}", "Look at the logs of Ray.") from error
