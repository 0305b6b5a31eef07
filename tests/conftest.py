"""What every test has: torch keeps its traces to itself."""

from __future__ import annotations

import logging

import torch  # noqa: F401  (makes the logger)

# pytest hangs its handlers on every logger that does not propagate, and torch formats a stack for every step
# of a trace as soon as this one has a handler: more than half of the time of an export.
logging.getLogger("torch.__trace").propagate = True
