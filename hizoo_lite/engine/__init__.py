"""Engine: loading, where blocks are, the traversal from a batch to per-branch losses, writing text."""
