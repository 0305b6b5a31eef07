"""Export for onnxruntime: the base once, in its quantized form, and adapters that are swapped on one session.

`folder`, `adapter` and `session` need numpy, onnxruntime and safetensors alone; nothing here imports torch
before it is needed.
"""
