"""The run: the step, the loop, evaluation, checkpoints, the run folder."""
