"""Export of a run's training graph, for `python -m hizoo_lite.edge train`: losses of all branches in one run."""
