"""What every test has: one thread for each of the processes that share the tests; torch keeps its traces."""

from __future__ import annotations

import logging
import os

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch counts the cores, here and in the processes of tests
    os.environ.setdefault("OMP_NUM_THREADS", "1")

os.environ.setdefault("HIZOO_LITE_REPORT", "0")  # a process of seconds after every run; test_report.py draws

import torch  # noqa: F401  (makes the logger)

# pytest hangs its handlers on every logger that does not propagate, and torch formats a stack for every step
# of a trace as soon as this one has a handler: more than half of the time of an export.
logging.getLogger("torch.__trace").propagate = True
