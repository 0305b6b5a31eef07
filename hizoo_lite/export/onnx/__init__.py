"""Export for onnxruntime: the base once, in its quantized form, and adapters that are swapped on one session.

torch's exporter to ONNX and what writes its weights are the extra `onnx`.
"""

from hizoo_lite.extras import need

for _module in ("onnx_ir", "onnxscript"):
    need(_module, "onnx", "export to ONNX")
