"""`python -m hizoo_lite.cli`, if the console script is not installed."""

from __future__ import annotations

from hizoo_lite.cli import main

main()
