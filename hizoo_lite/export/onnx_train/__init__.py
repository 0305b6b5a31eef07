"""Export of a run's training graph: losses of all branches in one run of onnxruntime."""
