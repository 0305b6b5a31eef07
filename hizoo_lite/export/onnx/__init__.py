"""Export for onnxruntime: the base once, in its quantized form, and adapters that are swapped on one session.

`folder`, `adapter`, `session` and `compare` need numpy, onnxruntime and safetensors alone; nothing here
imports torch before it is needed.
"""
