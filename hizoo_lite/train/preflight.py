"""What can be told to be wrong with a run before torch is imported: in a second, not in ten.

Everything here is asked again where it is used; this only asks early.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from hizoo_lite import synonyms
from hizoo_lite.checkpoints.adapter import find_adapter
from hizoo_lite.checkpoints.declared import positions_of
from hizoo_lite.config import EMBEDDED, TrainConfig
from hizoo_lite.errors import UserError
from hizoo_lite.tasks import Task, chat_templates
from hizoo_lite.tasks.tokens import usable_length
from hizoo_lite.train import components, provenance
from hizoo_lite.train.folder import RunFolder


def check(config: TrainConfig) -> None:
    """Raises UserError for folder, tracker, chat template, task, data or model that a run could not have."""
    if config.out is not None and not config.resume:
        RunFolder(config.out).check_new()
    check_tracker(config.tracker)
    check_template(config.chat_template)
    provenance.begun_from(config)
    check_inputs(config)


def check_inputs(config: TrainConfig) -> Task:
    """The task. Raises UserError for a task, data or a model that is not there."""
    task = components.task_of(config)
    for part, source in zip(task.parts, components.sources(config, task), strict=True):
        part.peek(source)
    if config.strict:
        components.make_splits(config, task)  # every row is read
    folder = check_model(config.model, config.revision)
    if folder is not None:
        usable_length(config.max_length, positions_of(folder))
    return task


def check_adapter(path: str | None, called: str = "--adapter") -> None:
    """Raises UserError if a path is given and is no folder of a run or of an adapter."""
    try:
        if path is not None:
            find_adapter(path)
    except UserError as error:
        raise UserError(str(error).replace("--adapter", called, 1)) from error


def check_tracker(name: str) -> None:
    """Raises UserError if the package of an experiment tracker is not installed."""
    if name != "none" and importlib.util.find_spec(name) is None:
        raise UserError(f"--tracker: {name} is not installed here; install it, or use none")


def check_template(name_or_file: str | None) -> None:
    """Raises UserError if a chat template is named and is none."""
    if name_or_file is not None:
        chat_templates.read(name_or_file)


def check_model(source: str | None, revision: str | None = None) -> Path | None:
    """The folder with a model's config.json; None if no model is given, and for the embedded one.

    Raises UserError if it is neither a folder nor, as far as the hub says, an id.
    """
    if source is None or source == EMBEDDED:
        return None
    from hizoo_lite.checkpoints import hub  # it takes half a second

    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    hub.check_source(source)
    if synonyms.meant(source, [EMBEDDED]):
        raise UserError(f"model: there is no folder {source}{synonyms.hint(source, [EMBEDDED])}")
    return hub.resolve_small(source, revision)
