"""What kind of model a checkpoint is: causal, masked, or a classifier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from hizoo_lite.base import ModelKind
from hizoo_lite.checkpoints.checkpoint import Checkpoint
from hizoo_lite.config import DEMO, EMBEDDED
from hizoo_lite.errors import UserError
from hizoo_lite.tasks import Task

#: Endings of an architecture's name in config.json, and the kind of model they say.
_KINDS: dict[str, ModelKind] = {
    "ForCausalLM": "causal",
    "LMHeadModel": "causal",
    "ForMaskedLM": "masked",
    "ForPreTraining": "masked",
    "ForSequenceClassification": "classifier",
}


#: If no ending says it (BertGenerationDecoder): transformers' own lists, model type -> class.
_CLASSES: dict[ModelKind, Mapping[str, Any]] = {
    "causal": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked": MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "classifier": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
}


def model_path(source: str) -> str:
    """The folder or hub id of a model; the package's own for the embedded one."""
    return str(DEMO) if source == EMBEDDED else source


def find_kind(source: str, revision: str | None, task: Task | None) -> ModelKind:
    """The kind of a model by its architecture's name; a bare trunk becomes a classifier."""
    return kind_of(Checkpoint.open(source, revision=revision).config, source, task)


def kind_of(config: Mapping[str, Any], source: str, task: Task | None = None) -> ModelKind:
    """The same from the content of its config.json; `source` for messages."""
    names = config.get("architectures") or ["(none)"]
    for ending, kind in _KINDS.items():
        if names[0].endswith(ending):
            return kind
    for kind, classes in _CLASSES.items():
        if names[0] in classes.values():
            return kind
    if names[0].endswith("Model") and task is not None and task.num_labels is not None:
        return "classifier"
    raise UserError(
        f"--kind: the architecture {names[0]!r} of {source} does not tell; "
        "allowed: causal, masked, classifier"
    )
