"""Exports: what a run has made, in the formats that other programs read."""
