"""Where a block's weights are while it is not being computed. Members: `Resident`.

A residency is called around every block of a traversal; it brings the weights in and lets them go.
"""

from __future__ import annotations


class Resident:
    """Every block stays on the compute device from loading to the end of the run."""

    name = "resident"

    def acquire(self, block: int) -> None:
        """Nothing to bring in."""

    def release(self, block: int) -> None:
        """Nothing to let go."""

    def keep(self, block: int) -> None:
        """Buffers that are here were changed where they are."""

    def close(self) -> None:
        """Nothing is open."""
