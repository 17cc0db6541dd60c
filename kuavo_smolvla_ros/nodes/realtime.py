"""Precedence over other processes: the arms must not wait because the machine is busy."""

from __future__ import annotations

import os

PRIORITY = 20  # below what kernels give interrupts (50), above everything that did not ask

HOW_TO = "give it an rtprio limit of 50 in /etc/security/limits.conf and log in again"


def take_precedence() -> str:
    """Ask for real-time scheduling for this thread and those it starts from now on; says what came of it.

    Without it, commands come late whenever the processor has more to do than it can: the executor then stops
    the arms by itself (`control_gap`), which is safe and a nuisance.
    """
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(PRIORITY))
    except PermissionError:
        return f"runs without real-time priority: not permitted (to let it: {HOW_TO})"
    except OSError as error:
        return f"runs without real-time priority: {error.strerror}"
    return f"runs with real-time priority {PRIORITY}"
