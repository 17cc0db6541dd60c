"""What holds for every test: ROS stays on this machine, in a domain of its own, with strict messages."""

from __future__ import annotations

import fcntl
import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest
from hypothesis import HealthCheck, settings

from kuavo_smolvla_ros import dds

# Fast DDS's ports stay below the kernel's ephemeral range only for these domains.
DOMAINS = range(1, 102)


def reserve_domain() -> tuple[int, IO[str]]:
    """A ROS domain that no other test process on this machine uses, and the lock that keeps it so."""
    for offset in range(len(DOMAINS)):
        domain = DOMAINS[(os.getpid() + offset) % len(DOMAINS)]
        lock = (Path(tempfile.gettempdir()) / f"kuavo_smolvla_ros_test_domain_{domain}.lock").open("a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            continue
        return domain, lock
    raise RuntimeError("all ROS domains from 1 to 101 are reserved by other test runs on this machine")


# What is started in the background of a script ignores Ctrl-C, and so would every process a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Before any test module imports rclpy or a message: these are read at import or at the first participant.
dds.apply(loopback=True)
_domain, _domain_lock = reserve_domain()
os.environ["ROS_DOMAIN_ID"] = str(_domain)
os.environ["ROS_PYTHON_CHECK_FIELDS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that needs the network is a defect

settings.register_profile(
    "fast", max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("thorough", parent=settings.get_profile("fast"), max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))


@pytest.fixture(name="reserve_domain", scope="session")
def _reserve_domain() -> Callable[[], tuple[int, IO[str]]]:
    """For tests that start nodes: a domain for each test, free until its lock is closed."""
    return reserve_domain
