"""Workers as actors of a Ray cluster; one that dies, or whose machine dies, is replaced."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

from ddexport.runtime.backends import Configuration
from ddexport.runtime.errors import BackendError, DDError
from ddexport.runtime.shards.local import MAX_DEATHS, Shard
from ddexport.runtime.shards.worker import Task, Worker, configuration

CONNECT_SECONDS = 5
LOCAL = "local"  # Ray's word for a cluster of this machine alone, for as long as the command runs
PATIENCE = 30  # seconds until it is said that nothing happens

logger = logging.getLogger(__name__)


@contextmanager
def cluster(address: str) -> Iterator[Any]:
    """Ray, connected to a cluster. Raises BackendError."""
    # Nothing is reported to Ray's makers, and a cluster of our own writes no token under HOME.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address == LOCAL:
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    import ray

    where: dict[str, Any] = {"address": address}
    if address == LOCAL:
        where["include_dashboard"] = False
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


def configured(ray: Any, task: Task) -> Configuration:
    """The engine that would run on a machine of the cluster that has room for a worker. Raises DDError."""
    _room(ray, _share(task))
    gpus = _share(task)["num_gpus"]
    with _explained(ray):
        chosen = ray.get(ray.remote(num_cpus=0, num_gpus=gpus)(configuration).remote(task))
    assert isinstance(chosen, Configuration)
    return chosen


def draw(ray: Any, task: Task, shards: Sequence[Shard], workers: int | None) -> Iterator[int]:
    """Draws shards in so many actors, as many as the cluster has room for if None. Yields the number of
    images of every shard. Raises DDError.

    Not Ray's ActorPool, which gives work to actors that a busy cluster has no place for yet, and waits for
    them; nor its retries, which have no end.
    """
    share, todo, deaths = _share(task), deque(shards), 0
    actor = ray.remote(**share)(Worker)
    doing: dict[Any, tuple[Any, Shard | None]] = {}  # by what is waited for: the actor, and its shard

    def start() -> None:
        worker = actor.remote(task)
        doing[worker.open.remote()] = (worker, None)

    room = _room(ray, share)
    count = min(workers or room, room, len(shards))
    for _ in range(count):
        start()
    with _explained(ray):
        while todo or any(shard for _, shard in doing.values()):
            done, _ = ray.wait(list(doing), timeout=PATIENCE)
            if not done:
                if not any(shard for _, shard in doing.values()):
                    logger.warning("the cluster is busy: waiting for room for a worker, %s", share)
                continue
            worker, shard = doing.pop(done[0])
            try:
                drawn = ray.get(done[0])
            except ray.exceptions.RayActorError:
                deaths += 1
                if deaths == MAX_DEATHS * count:  # a machine that dies takes all its actors with it
                    raise
                if shard:
                    todo.appendleft(shard)
                start()
                continue
            if shard:
                deaths = 0
                yield drawn
            if todo:
                shard = todo.popleft()
                doing[worker.draw_whole.remote(*shard)] = (worker, shard)


def _share(task: Task) -> dict[str, int]:
    """What a worker takes of the cluster."""
    on_gpu = str(task.engine["device"]).startswith("cuda")
    return {"num_cpus": task.engine["threads"], "num_gpus": int(on_gpu)}


def _room(ray: Any, share: Mapping[str, int]) -> int:
    """How many workers the machines of the cluster hold. Raises BackendError for none."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    names = {"num_cpus": "CPU", "num_gpus": "GPU"}
    room = sum(min(int(own.get(names[key], 0)) // n for key, n in share.items() if n) for own in machines)
    if not room:
        wanted = ", ".join(f"{n} {names[key]}" for key, n in share.items() if n)
        raise BackendError(f"no machine of the cluster has {wanted} for a worker", "Give fewer --threads.")
    return room


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
