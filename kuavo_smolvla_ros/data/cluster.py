"""The same work per recording on a Ray cluster, for collections that outgrow one machine.

Only where the work runs differs: results come back in the order of the recordings and go through the one
writer, so the dataset has the same bytes. Recordings, robot description and the dataset's folder must be
reachable under the same paths from every machine, and every machine must have the same encoder.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from kuavo_smolvla_ros.data.pool import Results, Runner
from kuavo_smolvla_ros.data.recordings import Recording
from kuavo_smolvla_ros.data.shard import Job, RecordingShard, process
from kuavo_smolvla_ros.data.video import encoder_versions
from kuavo_smolvla_ros.errors import UsageError, UserError

LOCAL = "local"


def on_cluster(address: str, workers: int) -> Runner:
    """A runner on the cluster at `address`; `local` starts one of `workers` processes on this machine."""
    return partial(_on_cluster, address, workers)


def process_there(job: Job, recording: Recording, versions: dict[str, str]) -> RecordingShard:
    """On a machine of the cluster: refuse to make bytes that the others would not make."""
    if encoder_versions() != versions:
        raise UsageError(
            f"{os.uname().nodename} has another encoder ({encoder_versions()}) than the machine that asks "
            f"({versions}); install the same versions everywhere"
        )
    return process(job, recording)


def _on_cluster(address: str, workers: int, job: Job, recordings: Sequence[Recording]) -> Results:
    ray = _start(address, workers)
    try:
        # A recording whose machine is lost is done again elsewhere; one that fails reports it, and is not.
        remote = ray.remote(num_cpus=job.camera_threads, max_retries=3)(process_there)
        job = replace(job, spec=_absolute_spec(job.spec), spool=job.spool.absolute())
        window = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)) // job.camera_threads) + 1
        waiting: deque[Any] = deque()
        upcoming = iter(recordings)
        while True:
            while len(waiting) < window and (recording := next(upcoming, None)):
                there = replace(recording, path=recording.path.absolute())
                waiting.append(remote.remote(job, there, encoder_versions()))
            if not waiting:
                return
            yield _get(ray, waiting.popleft())
    finally:
        ray.shutdown()  # ends what is still at work for us


def _start(address: str, workers: int) -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise UsageError(
            "a cluster needs Ray, which is not installed: pip install 'kuavo_smolvla_ros[cluster]'"
        ) from None
    quiet = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
    try:
        if address == LOCAL:
            ray.init(num_cpus=workers, include_dashboard=False, **quiet)
        else:
            ray.init(address=address, **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"there is no Ray cluster at {address}: {reason}") from error
    return ray


def _get(ray: Any, reference: Any) -> RecordingShard:
    try:
        result: RecordingShard = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise UserError(
            f"the cluster lost its machines ({type(error).__name__}); what is done is kept: run it again"
        ) from error
    return result


def _absolute_spec(spec: str) -> str:
    return str(Path(spec).absolute()) if spec.endswith((".yaml", ".yml")) else spec
