"""Recordings through worker processes, results in the order of the recordings, memory bounded."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection

from kuavo_smolvla_ros.data.recordings import Recording
from kuavo_smolvla_ros.data.shard import Job, RecordingShard, process
from kuavo_smolvla_ros.errors import UserError

Results = Generator[RecordingShard, None, None]
Runner = Callable[[Job, Sequence[Recording]], Results]


def in_this_process(job: Job, recordings: Sequence[Recording]) -> Results:
    for recording in recordings:
        yield process(job, recording)


def in_processes(workers: int) -> Runner:
    """A runner that keeps `workers` processes busy.

    At most two results per worker wait for one that is slow, so memory does not grow with the collection.
    """
    return partial(_in_processes, workers)


def _in_processes(workers: int, job: Job, recordings: Sequence[Recording]) -> Results:
    waiting: deque[tuple[Recording, Future[RecordingShard]]] = deque()
    upcoming = iter(recordings)
    context = multiprocessing.get_context("spawn")  # an encoder's threads do not survive a fork
    lifeline, ours = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(
        workers, mp_context=context, initializer=_live_while_needed, initargs=(lifeline,)
    )
    try:
        while True:
            try:
                while len(waiting) < 2 * workers + 1 and (recording := next(upcoming, None)):
                    with _deaf_to_ctrl_c():
                        waiting.append((recording, pool.submit(process, job, recording)))
                if not waiting:
                    break
                shard = waiting[0][1].result()
            except BrokenProcessPool:  # heard of with the next result, or the next recording handed out
                names = ", ".join(recording.name for recording, _ in list(waiting)[:workers])
                raise UserError(
                    f"a worker process was killed while converting {names} (out of memory?); what is done is "
                    "kept: run the same command again, with fewer workers"
                ) from None
            waiting.popleft()
            yield shard
        pool.shutdown()
    finally:
        ours.close()  # whoever is still at work is not needed any more
        pool.shutdown(cancel_futures=True)
        lifeline.close()


@contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """Processes started here never hear of Ctrl-C, from their first moment on: a terminal sends it to all.

    `_live_while_needed` comes too late for that: a worker imports for a second before it runs. To this
    process it comes all the same, afterwards.
    """
    resource_tracker.ensure_running()  # or starting it with the first worker would end what is blocked here
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _live_while_needed(lifeline: Connection) -> None:
    """A worker ends with its parent, however that ends; Ctrl-C is for the parent to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        lifeline.poll(None)  # returns when the other end is closed
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
