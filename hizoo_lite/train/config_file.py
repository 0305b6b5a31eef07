"""A configuration from a TOML or YAML file and the flags that override it, and back into the run folder.

A `--config` is a path, or the name of a recipe (`demo`, `sst2-lora`). Paths inside a file are relative
to the current directory, as flags are. A key that is absent has the default.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import tomli_w

from hizoo_lite import synonyms
from hizoo_lite.config import (
    LARGEST,
    MAY_CHANGE_ON_RESUME,
    TASK_FILE,
    TrainConfig,
    as_one_or_several,
    choices,
    default,
    kinds,
    members,
    problems,
    refuse,
    settings,
)
from hizoo_lite.errors import UserError
from hizoo_lite.files import parse_toml, parse_yaml, read_json
from hizoo_lite.plan import hardware
from hizoo_lite.plan.hardware import profiles_folder
from hizoo_lite.registry import SPACES

#: What settings meant that the config.toml of an older run does not have: it goes on, and replays, as it was.
OLDER: dict[str, Any] = {
    "blocks": "all",
    "train_a": True,
    "curvature_from": "losses",
    "balanced": "off",
    "by_length": "off",
    "directions": 1,
    "head": "estimated",
    "hidden_states": "off",
    "all_data": "off",
}


#: What a flag has: a text, or several of a setting that may have them; a switch is true or false.
Flag = str | bool | list[str]

#: Files of a run folder that have what was given in memory, by the setting that names them.
OWN = {"data": "data", "task": TASK_FILE}


def flag(name: str) -> str:
    """The flag of a field: `--batch-size`."""
    return "--" + name.replace("_", "-")


def recipes() -> list[str]:
    """The names of the shipped ones."""
    return sorted(path.stem for path in profiles_folder().glob("*.toml"))


def find(path_or_name: str, where: str = "--config") -> Path:
    """The file behind `--config`. UserError naming the recipes if there is none."""
    path = Path(path_or_name)
    if os.path.isfile(path):  # False also where no file can have such a name
        return path
    recipe = profiles_folder() / f"{path_or_name}.toml"
    if path.name == path_or_name and os.path.isfile(recipe):
        return recipe
    known = ", ".join(recipes()) or "none found"
    raise UserError(
        f"{where}: got {path_or_name!r}, which is no file; allowed: a TOML or YAML file, or a recipe "
        f"({known})"
    )


def resolve(config: str | None = None, flags: Mapping[str, Flag] | None = None) -> TrainConfig:
    """Defaults, then the machine's profile, the file, the flags (texts by name). UserError with all problems.

    With `resume` and without a `config` the run folder's own config.toml is the file. That is complete: only
    a profile that is given anew fills what it leaves open.
    """
    flags = flags or {}
    file = find(config) if config is not None else _of_run(flags)
    found: list[str] = []
    origin: dict[str, str] = {}
    values = _read(file, found, origin) if file is not None else {}
    if config is None and file is not None:
        values = _of_folder({**OLDER, **values}, file.parent)
    if "task" in flags:  # weights are of the file's tasks
        values.pop("task_weight", None)
    for name, text in flags.items():
        values[name], origin[name] = _parsed(name, text), flag(name)

    if config is not None or file is None or "profile" in flags:
        values = with_profile(values, found)

    def where(name: str) -> str:
        return origin.get(name, flag(name))

    refuse(found + problems(values, where))
    return TrainConfig(**values)


def read(path: Path) -> TrainConfig:
    """The settings of a run as it resolved them. UserError with every problem."""
    found: list[str] = []
    origin: dict[str, str] = {}
    values = _of_folder({**OLDER, **_read(path, found, origin)}, path.parent)
    refuse(found + problems(values, lambda name: origin.get(name, name)))
    return TrainConfig(**values)


def with_profile(values: Mapping[str, Any], found: list[str] | None = None) -> dict[str, Any]:
    """The settings and, for those that are not given, the profile's that they name.

    UserError if there is no such profile; with `found` that is added to it.
    """
    name = values.get("profile")
    if not isinstance(name, str):
        return dict(values)
    try:
        return {**hardware.find(name).settings(values), **values}
    except UserError as error:
        if found is None:
            raise
        found.append(str(error))
        return dict(values)


def _of_folder(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What a run has in its own folder is there: that may have been moved, or is seen from elsewhere."""
    return values | {name: str(folder / file) for name, file in OWN.items() if _is_own(values, name)}


def _is_own(values: Mapping[str, Any], name: str) -> bool:
    """Whether the run folder itself has what a setting names, since it was given in memory."""
    own = f"{values.get('out') or ''}/{OWN[name]}" if name in OWN else None
    found = values.get(name)
    return isinstance(found, str) and own is not None and _posix(found) == _posix(own)


def _posix(path: str) -> str:
    """A path with forward slashes alone, as another system may have written it."""
    return path.replace("\\", "/").replace("//", "/").removeprefix("./")


def _of_run(flags: Mapping[str, Flag]) -> Path | None:
    """The configuration of the run that is to be resumed. UserError if there is no run."""
    if flags.get("resume") is not True or "out" not in flags:
        return None
    path = Path(str(flags["out"])) / "config.toml"
    if not os.path.isfile(path):  # False also where no folder can have such a name
        found = f"{path.parent} holds no run (no {path.name}); leave --resume out to begin one"
        refuse([found], "--resume")
    return path


def _read(path: Path, found: list[str], origin: dict[str, str]) -> dict[str, Any]:
    """The known keys of a file; unknown ones are added to `found`."""
    is_yaml = path.suffix.lower() in (".yaml", ".yml")
    try:
        document = (parse_yaml if is_yaml else parse_toml)(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        refuse([f"not valid {'YAML' if is_yaml else 'TOML'}: {error}"], str(path))
    values: dict[str, Any] = {}
    for key, value in document.items():
        name = key.replace("-", "_")
        if name not in settings():
            found.append(f"{path}: {key}: unknown key{synonyms.hint(name, settings())}")
            continue
        read = _of_yaml(name, value) if is_yaml else value
        values[name], origin[name] = _typed(name, read), f"{path}: {key}"
    return values


def _of_yaml(name: str, value: Any) -> Any:
    """Its texts, which numbers are too, as those of flags."""
    if isinstance(value, list):
        return [_of_yaml(name, item) for item in value]
    return _parsed(name, value) if isinstance(value, str) else value


def _typed(name: str, value: Any) -> Any:
    """TOML writes 1 for 1.0, and may list names that a flag joins with commas."""
    if isinstance(value, list) and name == "targets" and all(isinstance(item, str) for item in value):
        return ",".join(value)
    if isinstance(value, list) and "several" in settings()[name].metadata:
        return as_one_or_several([_typed(name, item) for item in value])
    if type(value) is int and float in members(kinds()[name]) and abs(value) <= LARGEST:
        return float(value)
    return value


def parsed(flags: Mapping[str, Flag]) -> dict[str, Any]:
    """Flags' texts, by field name, as their fields' types; what is none stays a text, for `TrainConfig`."""
    return {name: _parsed(name, text) for name, text in flags.items()}


def _parsed(name: str, text: Flag) -> Any:
    """A flag's text as its field's type; the text itself if it is none, for `problems` to report."""
    if isinstance(text, list):
        return as_one_or_several([_parsed(name, each) for each in text])
    accepted = members(kinds()[name])
    if isinstance(text, bool) or text in choices(kinds()[name]):
        return text
    for kind in (int, float):
        if kind in accepted:
            try:
                return kind(text)
            except ValueError:
                continue
    return text


def write(config: TrainConfig) -> str:
    """The TOML of a configuration, complete and in groups; `resolve` reads it back to an equal one."""
    lines = ["# The settings of this run; `hizoo-lite train --config` takes this file."]
    group = None
    for name, value in asdict(config).items():
        meta = settings()[name].metadata
        if meta["group"] != group:
            group = meta["group"]
            lines += ["", f"# {group}"]
        lines.append(_line(name, value))
    return "\n".join(lines) + "\n"


def _line(name: str, value: Any) -> str:
    return f"# {name} is not set" if value is None else tomli_w.dumps({name: value}).rstrip("\n")


#: What the settings are called in run.json.
_LASTING = "settings"


def lasting(config: TrainConfig) -> dict[str, Any]:
    """The entry of run.json with the settings that cannot change when a run is resumed."""
    kept = {name: value for name, value in asdict(config).items() if name not in MAY_CHANGE_ON_RESUME}
    return {_LASTING: kept}


def as_begun(old: TrainConfig, new: TrainConfig) -> TrainConfig:
    """`new` with what the run settled when it was begun: kind, bits, steps of its epochs, dev examples."""
    if new.epochs is not None:
        refuse([f"epochs: the run has {old.steps} steps, got {new.epochs:g}; allowed: --steps"], "--resume")
    left_open = {"kind": "auto", "bits": None, "compute_dtype": "auto", "dev_examples": "auto"}
    if new.init_adapter is not None and new.init_adapter == old.init_adapter:  # whose own these are
        left_open |= {name: default(name) for name in ("rank", "alpha", "rslora", "targets")}
    same = {name: getattr(old, name) for name, value in left_open.items() if getattr(new, name) == value}
    return replace(new, **same)


def check_same_run(old: TrainConfig, new: TrainConfig, begins: bool = True) -> None:
    """UserError naming every setting of `new` that cannot change when a run is resumed.

    old: config.toml of the run in the folder `new.out`. What run.json there says of a setting counts more:
    config.toml may have been edited since. A run of an earlier version has no such entry. `begins`: whether
    a run may begin from an adapter, which is then told.
    """
    stated, after = asdict(old), asdict(new)
    before = {**stated, **_begun_with(Path(new.out or "") / "run.json")}
    kept = {name for name in after if name not in MAY_CHANGE_ON_RESUME}
    ends = [name for name in ("lr_schedule", "smoothing_schedule") if before[name] != "constant"]
    if not ends:
        kept.remove("steps")  # more of them are the same run, unless a schedule ends with them
    kept -= {name for name in OWN if _is_own(after, name)}  # `identity` compares what it holds
    why = {"steps": ": " + " and ".join(f"{name} {before[name]!r} ends with them" for name in ends)}
    if begins and before["space"] in SPACES.having("rank"):
        begin = f"--init-adapter {shlex.quote(str(new.out))} with another --out"
        why["steps"] += f"; more steps are a run of their own: {begin}"
    found = [
        f"{name}: the run has {before[name]!r}, got {after[name]!r}; it cannot change on --resume"
        + why.get(name, "")
        + (
            f"; put back into config.toml: {_line(name, before[name])}"
            if stated[name] != before[name]
            else ""
        )
        for name in after
        if name in kept and before[name] != after[name]
    ]
    refuse(found, "--resume")


def _begun_with(path: Path) -> dict[str, Any]:
    """The settings in a run.json, none if it has none. UserError if it is not valid."""
    wanted = "the run.json of the run, or no file: then nothing is compared"
    found = read_json(path, wanted).get(_LASTING, {}) if path.is_file() else {}
    if not isinstance(found, dict):
        raise UserError(f"{path}: {_LASTING}: got {found!r:.80}, allowed: an object")
    known = {name: value for name, value in found.items() if name in settings()}
    for name, value in known.items():
        try:
            _line(name, value)
        except TypeError as error:
            raise UserError(
                f"{path}: {_LASTING}: {name}: got {value!r:.80}, allowed: what config.toml can say"
            ) from error
    return {name: _typed(name, value) for name, value in known.items()}
