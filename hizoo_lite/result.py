"""`Run`, which `fit` returns: what a run came to, the tuned model, and what it can be written as."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from hizoo_lite.base import Bits
from hizoo_lite.checkpoints import hub
from hizoo_lite.engine.generate import generate
from hizoo_lite.errors import UserError
from hizoo_lite.tasks.files import Split
from hizoo_lite.train import evaluate as evaluation
from hizoo_lite.train.evaluate import Evaluation
from hizoo_lite.train.folder import RunFolder
from hizoo_lite.train.setup import Setup
from hizoo_lite.units import counted

if TYPE_CHECKING:
    from hizoo_lite.edge.folder import Export
    from hizoo_lite.export.merged import Dtype
    from hizoo_lite.export.onnx.linear import Format


@dataclass(frozen=True, eq=False, repr=False)
class Run:
    """A finished or interrupted run. Its space is still attached to `setup.model`.

    Attributes:
        folder: of the run.
        summary: as in summary.json.
        setup: model, data and method.
        before: evaluation of the test examples before the first step; None if this process made none.
        after: likewise after the last step.
    """

    folder: Path
    summary: dict[str, Any]
    setup: Setup
    before: Evaluation | None
    after: Evaluation | None

    def __repr__(self) -> str:
        """The folder, the steps, and what they came to, in one line."""
        parts = [f"{self.folder}: {counted(self.summary['steps'], 'step')}"]
        for name, scores in _scores(self.summary).items():
            if any(score is not None for score in scores):
                words = ["not measured" if score is None else f"{score:.4f}" for score in scores]
                parts.append(f"{name} {' -> '.join(words)}")
        return f"Run({', '.join(parts + ['interrupted'] * self.interrupted)})"

    def _repr_html_(self) -> str:
        """The same as a small table, for a notebook."""
        steps = counted(self.summary["steps"], "step")
        title = escape(f"{self.folder}: {steps}{', interrupted' * self.interrupted}")
        lines = []
        for name, scores in _scores(self.summary).items():
            cells = ("–" if score is None else f"{score:.4f}" for score in scores)
            lines.append(f"<tr><th>{escape(name)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
        head = "<tr><th></th><th>before</th><th>after</th></tr>"
        return f"<table><caption>{title}</caption>{head}{''.join(lines)}</table>"

    @property
    def interrupted(self) -> bool:
        """Whether a signal ended it before its last step."""
        return bool(self.summary["interrupted"])

    def evaluate(self, split: Split = "test") -> Evaluation:
        """Loss, metric and predictions of the tuned model on a part of the run's data.

        Args:
            split: "train", "dev" or "test".

        Raises:
            UserError: if that part is empty.
        """
        examples = getattr(self.setup.splits, checked_split(split))
        if not examples:
            raise UserError(f"split: the {split} part of the run is empty; allowed: another part")
        batch_size = self.setup.config.eval_batch_size
        return evaluation.evaluate(self.setup.traversal, self.setup.encoder, examples, batch_size)

    def generate(self, prompt: str, max_new_tokens: int = 64, **sampling: Any) -> str:
        """What the tuned causal model writes after a prompt, which it gets as it is.

        The task's own question is `hizoo-lite generate --adapter RUN`, or `evaluate`.

        Args:
            prompt: as for `hizoo_lite.generate`.
            max_new_tokens: at most so many.
            sampling: further arguments of `hizoo_lite.generate`.
        """
        return generate(self.setup.model, prompt, max_new_tokens, **sampling)

    @property
    def history(self) -> list[dict[str, Any]]:
        """Every line of metrics.jsonl: of steps and of evaluations, in order."""
        return RunFolder(self.folder).read_metrics()

    def save_pretrained(self, out: Path | str) -> Path:
        """Write the adapter for PEFT, with tokenizer and model card, into the new folder `out`."""
        return self.export_peft(out)

    def push_to_hub(self, name: str, *, private: bool = True) -> str:
        """Upload what `save_pretrained` writes to the Hub.

        Args:
            name: ORG/NAME; made if it is not there.
            private: whether one that is made is.

        Returns:
            Its address.

        Raises:
            UserError: if the Hub refuses or cannot be reached.
        """
        with tempfile.TemporaryDirectory() as place:
            return hub.push(self.export_peft(Path(place) / "adapter"), name, private=private)

    def report(self, out: Path | str | None = None) -> Path:
        """Write the HTML report, PNG and JSON beside it, to `out`; None: report.html in the run folder."""
        from hizoo_lite.report.report import write_report  # it imports matplotlib

        return write_report([self.folder], out).html

    def export_onnx(
        self, out: Path | str, *, name: str | None = None, format: Format | None = None, merge: bool = False
    ) -> Export:
        """Base and adapter for onnxruntime, compared with the model before they are left behind.

        The base is read from its files again, beside the model that is still loaded.

        Args:
            out: a new or empty folder; or an export of the same base, to which the adapter alone is added.
            name: of the adapter; None: the run folder's.
            format: how quantized weights are multiplied: "exact" (None), or "fast", whose difference from the
                model is recorded and not limited.
            merge: fold the adapter into the weights.

        Raises:
            UserError: before anything is written, if something does not fit.
            ExportError: if onnxruntime computes something else than the model, or cannot run it.
        """
        from hizoo_lite.export.onnx.export import export_onnx

        return export_onnx(self.folder, out, name=name, format=format, merge=merge)

    def export_peft(self, out: Path | str) -> Path:
        """Write the adapter into the new folder `out`, for `peft.PeftModel.from_pretrained`.

        Raises:
            UserError: if the run trained weights, for which PEFT has no form, or the folder is not empty.
        """
        from hizoo_lite.export import peft

        return peft.export(self.folder, out)

    def export_merged(
        self, out: Path | str, *, dtype: Dtype = "bf16", bits: Bits = "none", double_quant: bool = True
    ) -> Path:
        """Write the tuned model as a plain Hugging Face folder.

        Args:
            out: a new or empty folder, or one in which the same call was interrupted.
            dtype: of what is written.
            bits: "nf4", "fp4" or "int8" quantizes the blocks' matrices again; what the grid cannot hold of
                the change is lost.
            double_quant: of 4 bits: their scales in 8 bits.

        Raises:
            UserError: if the folder is not empty.
        """
        from hizoo_lite.export import merged

        merged.prepare(self.folder, out, dtype=dtype, bits=bits, double_quant=double_quant).run()
        return Path(out)


def _scores(summary: Mapping[str, Any]) -> dict[str, list[float | None]]:
    """Before and after, of the loss and of the metric; None if not measured."""
    keys = {"loss": "loss", summary["metric"]: "metric"}
    return {name: [summary[f"{key}_{when}"] for when in ("before", "after")] for name, key in keys.items()}


def checked_split(split: str) -> str:
    """`split` if it is one. UserError for any other text."""
    if split not in get_args(Split):
        raise UserError(f"split: got {split!r}, allowed: {', '.join(get_args(Split))}")
    return split
