"""Evaluation and generation with an exported model: what `eval --onnx` and `generate --onnx` call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hizoo_lite.arrays import NumpyArrays
from hizoo_lite.config import TrainConfig
from hizoo_lite.edge.model import OnnxModel, Pick, greedy
from hizoo_lite.errors import UserError
from hizoo_lite.noise import generator
from hizoo_lite.tasks import Encoder, Task, shown
from hizoo_lite.tasks.chat import Prompt, Shown, prompt_text
from hizoo_lite.tasks.tokens import check_sampling, pad_id, prompt_ids, usable_length
from hizoo_lite.train import components, provenance
from hizoo_lite.train.evaluate import evaluate, report
from hizoo_lite.train.folder import RunFolder
from hizoo_lite.train.progress import Progress


def eval_config(folder: Path, adapter: str | None, given: Mapping[str, Any]) -> TrainConfig:
    """The settings of the run that made the adapter, if it is a run folder; the flags on top."""
    chosen = {**given, "model": str(folder)}
    if adapter is not None and (Path(adapter) / "config.toml").is_file():
        return components.with_tasks(RunFolder(adapter).config(), chosen)
    provenance.check_data_is_given(str(folder), given)
    return TrainConfig(**chosen)


def evaluate_export(
    folder: Path,
    adapter: str | None,
    config: TrainConfig,
    split: str,
    limit: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The result as it is printed: scores by name, the loss first. `limit`: examples at most."""
    if limit is not None and limit < 1:
        raise UserError(f"--examples: got {limit}, allowed: a whole number of 1 or more")
    progress = progress or Progress()
    task = components.task_of(config)
    examples = components.split_part(config, task, split, limit)
    model = OnnxModel(folder, adapter, config.threads)
    encoder = _encoder(model, task, config)
    examples = components.fitting(encoder, examples, config)
    if model.kind == "classifier":
        model.session.graph.check_classes(task, model.session.graph.outputs[0])
    if adapter is None and model.adapters:
        progress.message(
            f"{folder}: the model without an adapter; --adapter has it with one of "
            f"{', '.join(model.adapters)}"
        )
    progress.phase("evaluate", len(examples))
    found = evaluate(model, encoder, examples, config.eval_batch_size, advanced=progress.advanced)
    progress.finish()
    about = {"bits": model.bits, "device": "cpu", "residency": "resident"}
    return report(found, config, adapter, split) | about


def answered(model: OnnxModel, adapter: str | None, text: str) -> str | None:
    """What an exported model answers to a text, as `train.saved.answered`; the adapter is a run's folder."""
    found = provenance.asked_by_run(adapter, text)
    if found is None:
        return None
    run, task, example = found
    predictions = evaluate(model, _encoder(model, task, run), [example], 1).predictions
    return shown.answer(task, example, predictions[0]) if predictions else None


def _encoder(model: OnnxModel, task: Task, config: TrainConfig) -> Encoder:
    """What makes the task's examples sequences of the model."""
    most = usable_length(config.max_length, model.positions)
    about = {"classes": model.id2label, "vocabulary": model.vocabulary}
    return components.task_encoder(model.tokenizer, model.kind, task, most, config.loss, **about)


def continue_text(
    model: OnnxModel,
    prompt: Prompt,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    on_text: Callable[[str], None] | None = None,
) -> str:
    """The text that a causal model writes after `prompt`; a pure function of the arguments.

    temperature 0 takes the most likely token each time; otherwise it is sampled from the most likely ones
    that hold `top_p` of the probability. Samples are drawn by numpy: they differ from those of torch.
    `prompt` and `on_text` as for `engine.generate.generate`.
    Raises `UserError` as `check_sampling` and `prompt_ids` do.
    """
    check_sampling(max_new_tokens, temperature, top_p, seed)
    tokenizer = model.tokenizer
    text, special = prompt_text(tokenizer, prompt)
    ids = prompt_ids(tokenizer, text, max_new_tokens, model.positions, model.vocabulary, special)
    pick = greedy if temperature == 0 else sampler(temperature, top_p, seed)
    shown = None if on_text is None else Shown(tokenizer, ids, on_text)
    [written] = model.write([ids], pad_id(tokenizer, model.vocabulary), max_new_tokens, shown, pick=pick)
    whole = tokenizer.decode([*ids, *written], skip_special_tokens=True)
    found = whole[len(tokenizer.decode(ids, skip_special_tokens=True)) :]
    if shown is not None:
        shown.finish(found)
    return found


def sampler(temperature: float, top_p: float, seed: int) -> Pick:
    """Draws tokens: the largest of the logits with Gumbel noise, which is a draw from their softmax."""
    draw = generator(seed, "generate")

    def pick(logits: np.ndarray) -> np.ndarray:
        scaled = logits.astype(np.float64) / temperature
        if top_p < 1.0:
            order = np.argsort(-scaled, axis=-1, kind="stable")
            share = np.exp(NumpyArrays().log_softmax(np.take_along_axis(scaled, order, axis=-1)))
            unlikely = share.cumsum(axis=-1) - share >= top_p  # what comes before it is enough
            unlikely[:, 0] = False
            np.put_along_axis(
                scaled, order, np.where(unlikely, -np.inf, np.take_along_axis(scaled, order, -1)), -1
            )
        return (scaled + draw.gumbel(size=scaled.shape)).argmax(axis=-1)

    return pick
