"""Files of tensors: checkpoints of models, adapters, fingerprints."""
