"""A trainer in the shape of TRL's SFTTrainer; TRL itself is not needed.

Rows are the forms that `tasks/forms.py` recognises: messages, prompt and completion, text. Prompts have no
loss and conversations have it on the assistant's turns; a completion ends in the end-of-sequence token. A
text is taken as it is, and one that is longer than `max_length` is divided.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from transformers import TrainingArguments

from hizoo_lite.config import refuse
from hizoo_lite.errors import UserError
from hizoo_lite.integrations.trainer import HiZOOTrainer
from hizoo_lite.tasks import Records, forms

_log = logging.getLogger(__name__)

#: What `SFTConfig` has beside transformers' arguments and is read here, with TRL's defaults.
_OWN: dict[str, Any] = {
    "max_length": 1024,
    "dataset_text_field": "text",
    "packing": False,
    "completion_only_loss": None,
    "assistant_only_loss": False,
    "dataset_num_proc": None,
}


class HiZOOSFTTrainer(HiZOOTrainer):
    """`HiZOOTrainer` with the arguments of TRL's `SFTTrainer`.

    Args:
        model: as for `HiZOOTrainer`.
        args: TRL's `SFTConfig`, or any object with some of its attributes.
        data_collator: as for `HiZOOTrainer`.
        train_dataset: rows of messages, of prompt and completion, or of text.
        eval_dataset: likewise.
        processing_class: as for `HiZOOTrainer`.
        compute_metrics: as for `HiZOOTrainer`.
        callbacks: as for `HiZOOTrainer`.
        peft_config: PEFT's `LoraConfig`, in place of `space`.
        formatting_func: from a row to its text, of which every token is learnt.
        options: as for `HiZOOTrainer`.

    Raises:
        UserError: for bad input.
    """

    def __init__(
        self,
        model: Any,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Any = None,
        callbacks: Sequence[Any] | None = None,
        *,
        peft_config: Any = None,
        formatting_func: Callable[[Any], str] | None = None,
        **options: Any,
    ) -> None:
        own = {name: getattr(args, name, usual) for name, usual in _OWN.items()}
        self._formatting, self._text_field = formatting_func, own["dataset_text_field"]
        if peft_config is not None:
            options = {"space": peft_config, **options}
        super().__init__(
            model,
            _arguments(args),
            data_collator,
            train_dataset,
            eval_dataset,
            processing_class,
            compute_metrics,
            callbacks,
            read=frozenset(_OWN),
            **{"max_length": own["max_length"], **options},
        )
        self._check(own)

    def _rows(self, name: str, given: Any) -> list[dict[str, Any]]:
        rows = super()._rows(name, given)
        if self._formatting is not None:
            rows = [{"text": self._formatting(row)} for row in rows]
            self._text_field = "text"
        known = {"input_ids", "messages", "conversations", "prompt"}
        if self.task is None and self._text_field in rows[0] and not known & rows[0].keys():
            self.task = "text"
            self.options.setdefault("text_field", self._text_field)
        return rows

    def _check(self, own: Mapping[str, Any]) -> None:
        """UserError for what is learnt otherwise here; a conversation's loss is told."""
        rows = self.train_dataset or self.eval_dataset or []
        has = {name for row in rows[:1] for name in row}
        wrong = {
            "packing": (
                own["packing"],
                "False: every example is a row of its own, in batches of like length",
            ),
            "max_length": (own["max_length"] is None, "a whole number"),
            "completion_only_loss": (
                own["completion_only_loss"] is False and "completion" in has,
                "None or True with prompt and completion; or one column of texts",
            ),
        }
        refuse(
            [
                f"{name}: got {own[name]!r}, allowed: {allowed}"
                for name, (bad, allowed) in wrong.items()
                if bad
            ]
        )
        if not rows or own["assistant_only_loss"] or self.task is not None or "input_ids" in has:
            return
        if forms.recognise(Records({"train": rows})).keys["kind"] == "chat":
            _log.warning("assistant_only_loss: conversations have their loss on the assistant's turns alone")


def _arguments(args: Any) -> TrainingArguments | None:
    """transformers' arguments: those that are given, or made of the attributes of another object."""
    if args is None or isinstance(args, TrainingArguments):
        return args
    given = dict(vars(args))
    known = {field.name for field in fields(TrainingArguments)}
    unknown = sorted(given.keys() - known - _OWN.keys())
    if unknown:
        raise UserError(f"args: {', '.join(unknown)}: nothing here reads that; leave it out")
    return TrainingArguments(**{name: value for name, value in given.items() if name in known})
