"""The setting of glibc's allocator: once, and not where it is switched off or there is no glibc."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from hizoo_lite import process
from hizoo_lite.process import resident


def test_glibc_takes_the_thresholds_and_the_switch_turns_them_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HIZOO_LITE_KEEP_HEAP", "0")
    assert process.keep_heap.__wrapped__() is False
    monkeypatch.delenv("HIZOO_LITE_KEEP_HEAP")
    assert process.keep_heap.__wrapped__() is (platform.libc_ver()[0] == "glibc")
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert process.keep_heap.__wrapped__() is False


#: In a process of its own: which thresholds this one has depends on the tests before.
_TRIM = """
import torch
from hizoo_lite import process
from hizoo_lite.process import resident
from hizoo_lite.process import resident

assert process.keep_heap()
block = torch.ones(64 << 20, dtype=torch.uint8)
del block
before = resident().anon_bytes
process.trim()
print(before - resident().anon_bytes)
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or resident().anon_bytes is None,
    reason="needs glibc and /proc/self/status",
)
def test_trim_gives_freed_pages_back() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "HIZOO_LITE_KEEP_HEAP"}
    done = subprocess.run([sys.executable, "-c", _TRIM], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 32 << 20  # at least half of the 64 MiB; the top of the heap may be in use
