"""The encoder of a model that is not loaded: of its files the tokenizer and config.json are read."""

from __future__ import annotations

from pathlib import Path

from hizoo_lite.base import ModelKind
from hizoo_lite.checkpoints.declared import positions_of
from hizoo_lite.config import TrainConfig
from hizoo_lite.model.build import read_config, read_tokenizer, vocabulary_of
from hizoo_lite.tasks import Encoder, Task, chat_templates
from hizoo_lite.tasks.tokens import usable_length
from hizoo_lite.train.components import task_encoder


def encoder_of(folder: Path, kind: ModelKind, task: Task, config: TrainConfig) -> Encoder | None:
    """The task's encoder for the model in a folder; None without a tokenizer."""
    tokenizer = read_tokenizer(folder)
    chat_templates.give(tokenizer, config.chat_template)
    if tokenizer is None:
        return None
    known = vocabulary_of(read_config(folder, kind, task.num_labels or 2))
    limit = usable_length(config.max_length, positions_of(folder))
    return task_encoder(tokenizer, kind, task, limit, config.loss, vocabulary=known)
