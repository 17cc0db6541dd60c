import platform
import subprocess
import sys

import pytest

from kuavo_smolvla_ros.learning import heap
from kuavo_smolvla_ros.learning.heap import keep_freed_memory

FAULTS = """
import resource
import sys
import torch
from kuavo_smolvla_ros.learning.heap import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
def use():
    torch.ones(20_000_000)
for _ in range(12):
    use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_pages_are_not_asked_for_again():
    def faults(how):
        command = [sys.executable, "-c", FAULTS, how]
        return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout)

    given_back, kept = faults("given back"), faults("kept")
    assert given_back > 5 * 80_000_000 // 2**21  # at least once per page, however large pages are
    assert kept < given_back / 10


@pytest.mark.parametrize(
    "fault", [OSError("no such library"), AttributeError("mallopt"), TypeError("no name")]
)
def test_another_c_library(monkeypatch, fault):
    def library(name):
        raise fault

    monkeypatch.setattr(heap.ctypes, "CDLL", library)
    assert keep_freed_memory() is False


def test_a_refusal_is_told(monkeypatch):
    class Library:
        def mallopt(self, what, value):
            return 0

    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: Library())
    assert keep_freed_memory() is False
