"""Export of a run's training graph: losses of all branches in one run of onnxruntime."""

import hizoo_lite.export.onnx  # noqa: F401  says which extra is missing
