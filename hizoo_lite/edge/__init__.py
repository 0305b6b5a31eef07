"""Evaluation, generation and training on a device with numpy and onnxruntime: no torch, no transformers.

    python -m hizoo_lite.edge train DIR --data D --out RUN

DIR is what `hizoo-lite export` wrote. Tokenizers need the `tokenizers` library; chat templates need jinja2.
"""
