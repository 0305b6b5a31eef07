"""What is given in Python as a configuration: settings, a loaded model, objects in place of names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import tomli_w
import torch

from hizoo_lite import spaces, synonyms, tasks
from hizoo_lite.base import Curvature, Estimator, Space
from hizoo_lite.config import TrainConfig, by_members, refuse, settings
from hizoo_lite.device import choose_device, is_gpu
from hizoo_lite.errors import UserError
from hizoo_lite.files import storage_errors, write_text
from hizoo_lite.model.build import compute_name
from hizoo_lite.model.model import Model
from hizoo_lite.registry import CURVATURES, ESTIMATORS, SPACES
from hizoo_lite.tasks import Records, Task, TaskLike
from hizoo_lite.train import config_file
from hizoo_lite.train.folder import RunFolder
from hizoo_lite.train.ranks import Ranks

#: What the data of a run is called until its folder is known.
IN_MEMORY = "in memory"
#: Members that say what `auto` is, see `by_members`.
_DECIDING = ("objective", "estimator")
_Part = TypeVar("_Part", Space, Estimator, Curvature)
#: PEFT's names of settings, which Python takes as ours.
_PEFTS = {"r": "rank", "lora_alpha": "alpha", "target_modules": "targets", "use_rslora": "rslora"}
#: Of objects that stand in for a name.
_EXAMPLES = {"space": "LoRA(rank=8), or peft's LoraConfig", "estimator": "HiZOO()", "curvature": "Grouped()"}


class Given(NamedTuple):
    """What was given in memory and is to be in the run folder, so that the run can be resumed from there."""

    task: Mapping[str, Any] | None
    data: Records | None

    def write(self, folder: RunFolder) -> None:
        """task.toml and data/."""
        with storage_errors(folder.path):
            if self.task is not None:
                write_text(folder.task, tomli_w.dumps(self.task))
            if self.data is not None:
                self.data.write(folder.data)


def in_memory(
    task: TaskLike | list[str] | tuple[str, ...] | None, data: Any, options: dict[str, Any]
) -> tuple[Task | None, Records | None]:
    """The task and the data, unless they are names; `options` gets what the configuration calls them.

    UserError for several tasks, or data of several, that are no names.
    """
    if isinstance(task, list | tuple) or _are_names(data):
        for name, given in (("task", task), ("data", data)):
            if given is None or _are_names(given) or isinstance(given, str | Path):
                options |= {} if given is None else {name: _names(given)}
            else:
                raise UserError(f"{name}: got {given!r:.80}, allowed with several tasks: names or paths")
        return None, None
    found = None if task is None or isinstance(task, str | Path) else tasks.get(task)
    records = None if data is None or isinstance(data, str | Path) else Records(data)
    for name, given, made in (("task", task, found), ("data", data, records)):
        if given is not None:
            options[name] = str(given) if made is None else getattr(made, "name", IN_MEMORY)
    return found, records


def _are_names(given: Any) -> bool:
    """Whether it is a list of names or paths, one at least."""
    is_list = isinstance(given, list | tuple) and len(given) > 0
    return is_list and all(isinstance(one, str | Path) for one in given)


def _names(given: Any) -> Any:
    return str(given) if isinstance(given, str | Path) else [str(one) for one in given]


def object_of(field: str, given: _Part | str | None) -> _Part | None:
    """What was given in place of a name; None for a name. UserError for a class and for what has no name.

    A configuration of PEFT is the space that it describes.
    """
    if given is None or isinstance(given, str):
        return None
    if field == SPACES.axis and hasattr(given, "peft_type"):
        return spaces.of_peft(given)  # type: ignore[return-value]
    if isinstance(given, type) or not isinstance(getattr(given, "name", None), str):
        raise UserError(
            f"{field}: got {given!r:.80}, allowed: a name, or an object such as {_EXAMPLES[field]}"
        )
    return given


def configured(
    model: TrainConfig | Model | str,
    space: Space | None,
    estimator: Estimator | None,
    curvature: Curvature | None,
    options: dict[str, Any],
) -> tuple[TrainConfig, Model | None]:
    """The configuration, with what the given objects say about themselves."""
    named_paths = ((n, str(value) if isinstance(value, Path) else value) for n, value in options.items())
    given = dict(named_paths)
    twice = [
        f"{theirs}: is {ours}, which is given too"
        for theirs, ours in _PEFTS.items()
        if {theirs, ours} <= set(given)
    ]
    refuse(twice)
    options = {_PEFTS.get(name, name): value for name, value in given.items()}
    refuse([f"{n}: unknown setting{synonyms.hint(n, settings())}" for n in options if n not in settings()])
    named = {**SPACES.said_by(space), **ESTIMATORS.said_by(estimator), **CURVATURES.said_by(curvature)}
    for said in (options, named):
        if isinstance(said.get("targets"), list | tuple):
            said["targets"] = ",".join(said["targets"])
    refuse(
        [
            f"{name}: got {options[name]!r}, the object that was given has {value!r}; say it there alone"
            for name, value in named.items()
            if options.get(name, value) != value
        ]
    )
    options = {name: value for name, value in options.items() if name not in named}
    if isinstance(model, TrainConfig):
        said = {**options, **named}
        if any(said.get(axis, getattr(model, axis)) != getattr(model, axis) for axis in _DECIDING):
            left_open = (name for name, value in by_members(model).items() if getattr(model, name) == value)
            options = {**dict.fromkeys(left_open, "auto"), **options}
        return _with_budgets(replace(model, **options, **named)), None
    if isinstance(model, Model):
        named |= {"model": model.source, "kind": model.kind, "bits": model.bits}
        named |= {"device": _device_name(model.device), "compute_dtype": compute_name(model.compute)}
        if options.get("chat_template") not in (None, model.chat_template):
            raise UserError(
                f"chat_template: got {options['chat_template']!r}, but the model was loaded with "
                f"{model.chat_template!r}; allowed: load(..., chat_template=...)"
            )
        named |= {} if model.chat_template is None else {"chat_template": model.chat_template}
        named["residency"] = _residency(model, options.pop("residency", "auto"))
        options = {**model.limits.settings(), **config_file.with_profile(options)}
        return TrainConfig(**{**options, **named}), model
    return TrainConfig(**{"model": str(model), **config_file.with_profile(options), **named}), None


def _device_name(device: torch.device) -> str:
    """As a setting: without its index if that is the one that is chosen without."""
    return device.type if choose_device(device.type) == device else str(device)


def _with_budgets(config: TrainConfig) -> TrainConfig:
    """A configuration made in Python says nothing but None for what is not given: the budgets."""
    given = {name: value for name, value in vars(config).items() if value is not None}
    return TrainConfig(**config_file.with_profile(given))


def _residency(model: Model, wanted: str) -> str:
    """Of a loaded model: as it was loaded. UserError if another is asked for."""
    if wanted not in ("auto", model.residency.name):
        raise UserError(
            f"residency: got {wanted!r}, but the model was loaded with its blocks {model.residency.name}; "
            f"allowed: {model.residency.name}, auto, or load(..., residency={wanted!r})"
        )
    return model.limits.residency


def check_device(model: Model, device: torch.device, ranks: Ranks) -> None:
    """UserError if a loaded model is on the device of another rank; `device` is this one's."""
    if ranks.count > 1 and is_gpu(device) and model.device != device:
        raise UserError(
            f"device: the model was loaded on {model.device}, but that of rank {ranks.rank} is {device}; "
            f"allowed: load(..., device={device.type!r}), which takes it"
        )
