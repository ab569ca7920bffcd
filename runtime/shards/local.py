"""Workers as processes of this machine.

Our own, because the pools of the standard library drop the work of all processes when one dies.
"""

from __future__ import annotations

import logging
import multiprocessing
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ddexport.runtime.errors import BackendError, DDError
from ddexport.runtime.shards.worker import Task, Worker

MAX_DEATHS = 3  # without a shard between them
WHOLE = 0

Shard: TypeAlias = tuple[range, NDArray[np.int64]]


def draw(task: Task, shards: Sequence[Shard], workers: int) -> Iterator[int]:
    """Draws shards in so many processes. Yields the number of images of every batch; the shard of a process
    that dies is begun again, and its images are counted off. Raises DDError."""
    todo, deaths = deque(shards), 0
    doing: dict[Connection, tuple[Shard, int]] = {}  # by process: its shard, and the images that it has drawn
    processes: list[SpawnProcess] = []
    spawn = multiprocessing.get_context("spawn")

    def give(pipe: Connection) -> None:
        doing[pipe] = (todo.popleft(), 0)
        with suppress(OSError):  # of a process that died, which is told by its end of the pipe
            pipe.send(doing[pipe][0])

    try:
        while todo or doing:
            while todo and len(doing) < workers:
                ours, theirs = spawn.Pipe()
                process = spawn.Process(target=_work, args=(task, theirs, bool(processes)), daemon=True)
                process.start()
                theirs.close()
                processes.append(process)
                give(ours)
            for pipe in wait(list(doing)):
                assert isinstance(pipe, Connection)
                shard, done = doing[pipe]
                try:
                    said = pipe.recv()
                except (EOFError, OSError):
                    del doing[pipe]
                    todo.appendleft(shard)
                    deaths += 1
                    yield -done
                    if deaths == MAX_DEATHS:
                        raise BackendError(
                            f"{deaths} processes died one after another",
                            "Look at what they wrote; if memory is short, give fewer --workers.",
                        ) from None
                    continue
                if isinstance(said, DDError):
                    raise said
                if said != WHOLE:
                    doing[pipe] = (shard, done + said)
                    yield said
                    continue
                deaths = 0
                if todo:
                    give(pipe)
                else:
                    del doing[pipe]
                    pipe.close()
    finally:
        for process in processes:
            process.kill()
            process.join()


def _work(task: Task, pipe: Connection, quiet: bool) -> None:
    """A process: it ends when the other end of the pipe is closed, by its owner or by the owner's death."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the parent
    logging.basicConfig(format="warning: %(message)s", level=logging.ERROR if quiet else logging.WARNING)
    try:
        worker = Worker(task)
        worker.open()
        while True:
            for count in worker.draw(*pipe.recv()):
                pipe.send(count)
            pipe.send(WHOLE)
    except DDError as error:
        pipe.send(error)
    except (EOFError, BrokenPipeError):
        return
