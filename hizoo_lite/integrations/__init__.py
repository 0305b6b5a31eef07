"""Other libraries' interfaces to this one: transformers' Trainer, TRL's SFTTrainer; `lm_eval` by its name."""

from hizoo_lite.integrations.sft import HiZOOSFTTrainer
from hizoo_lite.integrations.trainer import HiZOOTrainer

__all__ = ["HiZOOSFTTrainer", "HiZOOTrainer"]
