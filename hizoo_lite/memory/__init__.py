"""What a run takes: limits, peaks, and samples over its blocks and steps."""
