"""What the folder of a run, or of PEFT's adapter, says about itself. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hizoo_lite.base import ModelKind
from hizoo_lite.batch import Example
from hizoo_lite.checkpoints.adapter import (
    PEFT_FILE,
    PEFT_PREFIX,
    SPACE_FILE,
    find_adapter,
    peft_weights,
    read_peft_config,
    read_record,
)
from hizoo_lite.checkpoints.tensorfile import SIZES, read_header
from hizoo_lite.config import TrainConfig, default, one_or_several, refuse
from hizoo_lite.errors import UserError
from hizoo_lite.tasks import Task
from hizoo_lite.tasks.asked import asked
from hizoo_lite.train import components
from hizoo_lite.train.folder import RunFolder

#: By PEFT's task type.
_KINDS: dict[str, ModelKind] = {"CAUSAL_LM": "causal", "SEQ_CLS": "classifier"}


def saved_config(path: Path | str | None) -> TrainConfig | None:
    """The settings of the run that made an adapter; None for an adapter without a run."""
    if path is None or not (Path(path) / "config.toml").is_file():
        return None
    return replace(RunFolder(path).config(), resume=False)


def saved_task(path: Path | str | None) -> tuple[TrainConfig, Task] | None:
    """The settings and the task of an adapter's run; None if there is no run, or its task is not here."""
    run = saved_config(path)
    if run is None:
        return None
    try:
        return run, components.find_task(run.task)
    except UserError:  # a function, or a file that is elsewhere
        return None


def asked_by_run(path: Path | str | None, text: str) -> tuple[TrainConfig, Task, Example] | None:
    """A text as the task of an adapter's run asks about one, with that run's settings.

    None as of `saved_task`, and if the task asks about something else (see `tasks/asked.py`).
    """
    found = saved_task(path)
    example = None if found is None else asked(found[1], text)
    return None if found is None or example is None else (*found, example)


def base_model(path: Path | str) -> str:
    """The model an adapter was made for, as it says itself."""
    folder = find_adapter(path)
    if (folder / SPACE_FILE).is_file():
        return str(read_record(folder)["base_model"])
    return str(read_peft_config(folder).get("base_model_name_or_path") or "")


def base_of(path: Path | str, model: Path | str | None = None) -> str:
    """What the base is called: as given, else by the run, else by the adapter itself."""
    settings = saved_config(path)
    return str(model or "") or (settings.model if settings else base_model(path))


def saved_kind(path: Path | str) -> ModelKind | None:
    """The kind of model that an adapter was made for, as its run or it itself says.

    None if neither does: PEFT's adapters have no task type by default, nor one of masked language models.
    """
    run, folder = saved_config(path), find_adapter(path)
    if run is not None and run.kind != "auto":
        return run.kind
    if (folder / SPACE_FILE).is_file():
        return read_record(folder)["kind"]
    return _KINDS.get(str(read_peft_config(folder).get("task_type")))


def is_tuned(path: Path | str) -> bool:
    """Whether a folder is one of `find_adapter`'s: a run, a checkpoint of one, an adapter."""
    return any((Path(path) / name).exists() for name in ("config.toml", "adapter", PEFT_FILE, SPACE_FILE))


def eval_config(adapter: str | None, given: Mapping[str, Any]) -> TrainConfig:
    """The run's settings, or the defaults, with the given ones on top."""
    run = saved_config(adapter)
    if run is not None:
        return components.with_tasks(run, given)
    if adapter is not None and "model" not in given:
        given = {**given, "model": base_model(adapter)}
    check_data_is_given(adapter or "the model", given)
    kind = None if adapter is None else saved_kind(adapter)
    return TrainConfig(**given if kind is None else {"kind": kind, **given})


def trained_on_line(adapter: str | None, config: TrainConfig, part: str, given: str | None) -> str:
    """What is to be told if what is evaluated may have been trained on, and --split did not ask for it.

    Args:
        adapter: a run's folder; of another adapter, and for None, it is not known what it was trained on.
        config: of the evaluation.
        part: which part of the data it is.
        given: what --split asked for.
    """
    run = saved_config(adapter)
    is_known_other = run is not None and _paths(run) != _paths(config)
    if part != "all" or given is not None or is_known_other:
        return ""
    return (
        f"all rows of {config.data}, also those that a run on it was trained on; --split test has the ones "
        "that it holds out"
    )


def _paths(config: TrainConfig) -> list[Path]:
    """Where the data of a configuration is."""
    return [Path(data).resolve() for data in one_or_several(config.data)]


def check_data_is_given(of: str, given: Mapping[str, Any]) -> None:
    """Raises UserError if neither data nor a task is given for what is no run, which would name them."""
    if not {"task", "data"} & set(given):
        raise UserError(
            f"--data: missing, and {of} is no run that would name it; allowed: a file or folder of yours, or "
            "--task with its data"
        )


#: Words for layers that those of an adapter take the place of.
_OPEN = {"targets": ("attention", "all-linear")}


def begun_from(config: TrainConfig) -> TrainConfig:
    """The settings with layers, rank and scale of the adapter that the run begins with, if it does.

    Raises UserError for a folder without one, and for settings that are others than its own.
    """
    if config.init_adapter is None or config.resume:
        return config
    where = "--init-adapter"
    try:
        folder = find_adapter(config.init_adapter)
    except UserError as error:
        raise UserError(str(error).replace("--adapter", where, 1)) from error
    if (folder / SPACE_FILE).is_file():
        raise UserError(
            f"{where}: {folder} has changed weights; allowed: an adapter; of changed weights take the merged "
            "model as --model"
        )
    said = read_peft_config(folder)
    names = [name.removeprefix(PEFT_PREFIX) for name in read_header(peft_weights(folder), SIZES)]
    layers = dict.fromkeys(name.partition(".lora_")[0] for name in names if ".lora_" in name)
    inside = [layer for layer in layers if any(part.isdigit() for part in layer.split("."))]  # not the head
    own: dict[str, Any] = {
        "rank": int(said["r"]),
        "alpha": float(said["lora_alpha"]),
        "rslora": bool(said.get("use_rslora")),
        "targets": ",".join(inside),
    }
    refuse(
        [
            f"--{name}: got {getattr(config, name)!r}, but {where} has {value!r:.80}; allowed: that"
            for name, value in own.items()
            if getattr(config, name) not in (default(name), value, *_OPEN.get(name, ()))
        ]
    )
    return replace(config, **own)
