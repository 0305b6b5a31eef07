"""A small task of its own data, and the settings of a short run on it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from hizoo_lite.config import one_or_several
from hizoo_lite.train import journal

STORIES = Path(__file__).parents[1] / "../shared/models/stories260K"

TASK = """name = "moods"
kind = "choice"
prompt = "{text} It was"
label_field = "label"

[answers]
bad = " bad"
good = " good"
"""


#: The same rows as texts to write. Of what the embedded model writes, "awful" is most.
TEXTS = """name = "verdicts"
kind = "completion"
prompt = "{text} It was"
answer = " an awful {label} thing.\\n"
metric = "f1"
"""


def stories() -> str:
    """A real trained Llama of 260 032 parameters; skips where the shared models are not there."""
    if not (STORIES / "config.json").is_file():
        pytest.skip("../shared/models/stories260K is not here")
    return str(STORIES)


def record_size(run: Path) -> int:
    """Bytes of a record of a run's journal."""
    found = journal._form(run / "journal.bin")
    assert found is not None
    return journal.record_bytes(*found[1])


def write_task(folder: Path) -> tuple[Path, Path]:
    """(the task's .toml, the folder with train.jsonl and test.jsonl)."""
    data = folder / "data"
    data.mkdir(parents=True)
    words = {"good": ["fine", "lovely", "warm"], "bad": ["dull", "cold", "sad"]}
    rows = [
        {"text": f"The {noun} was {word}.", "label": label}
        for label, found in words.items()
        for word in found
        for noun in ("day", "soup", "game", "dog")
    ]
    for split, part in (("train", rows[::2]), ("test", rows[1::4])):
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    task = folder / "moods.toml"
    task.write_text(TASK)
    return task, data


def write_texts(folder: Path) -> tuple[Path, Path]:
    """`write_task` with words to write that the embedded model knows."""
    task, data = write_task(folder)
    task.write_text(TEXTS)
    return task, data


def two_tasks(folder: Path, **changes: Any) -> dict[str, Any]:
    """Two small tasks of other words, answers and sizes, as settings; changes: of `short_run`."""
    own, other = folder / "moods", folder / "sides"
    task, data = write_task(own)
    more, rows = other / "sides.toml", [("left", "port"), ("right", "star"), ("up", "sky"), ("down", "earth")]
    other.mkdir()
    for split, count in (("train", 10), ("test", 3)):
        lines = [
            {"first": f"{word} {number} is", "side": side} for number in range(count) for side, word in rows
        ]
        (other / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    answers = "".join(f'{side} = " {side}"\n' for side, _ in rows)
    more.write_text(
        'name = "sides"\nkind = "choice"\nprompt = "Where? {first}"\nlabel_field = "side"\n[answers]\n'
        + answers
    )
    chosen = {"task": (str(task), str(more)), "data": (str(data), str(other)), "rank": 8, **changes}
    return short_run(own, out=str(folder / "run"), **chosen)


def write_classes(folder: Path, classes: int) -> dict[str, Any]:
    """A task of so many classes for a classifier, with its data, as fields of `TrainConfig`."""
    name = f"of{classes}"
    rows = "".join(
        json.dumps({"first": word, "label": number % classes}) + "\n"
        for number, word in enumerate(("it was good", "a boy", "the game is bad", "yes") * 3)
    )
    (folder / name).mkdir()
    for split in ("train", "test"):
        (folder / name / f"{split}.jsonl").write_text(rows)
    answers = "".join(f'{number} = " {number}"\n' for number in range(classes))
    (folder / f"{name}.toml").write_text(
        f'name = "{name}"\nkind = "choice"\nprompt = "{{first}} It was"\nclassifier_text = "{{first}}"\n'
        f'label_field = "label"\n[answers]\n{answers}'
    )
    task, data = str(folder / f"{name}.toml"), str(folder / name)
    return {"model": "m", "task": task, "data": data, "dev_examples": 2}


def short_run(folder: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a run of six steps on the embedded model, as fields of `TrainConfig`."""
    task, data = (
        write_task(folder)
        if not (folder / "moods.toml").exists()
        else (folder / "moods.toml", folder / "data")
    )
    chosen = {
        "model": "embedded",
        "task": str(task),
        "data": str(data),
        "out": str(folder / "run"),
        "device": "cpu",
        "steps": 6,
        "batch_size": 4,
        "max_length": 32,
        "rank": 2,
        "directions": 1,  # a pair: two forwards a step
        "lr_schedule": "constant",  # so that a run may get more steps on --resume
        "train_examples": 10,
        "dev_examples": 2,
        "eval_batch_size": 4,
    }
    return {**chosen, **changes}


def flags(settings: dict[str, Any]) -> list[str]:
    """The command line of some settings."""
    found = []
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            found.append(flag if value else "--no-" + flag[2:])
        else:
            found += [text for one in one_or_several(value) for text in (flag, str(one))]
    return found


def shallow(folder: Path) -> Path:
    """The embedded model with its first block alone, where a block is as good as four."""
    from safetensors.torch import load_file, save_file

    import hizoo_lite

    copy = folder / "shallow"
    shutil.copytree(Path(hizoo_lite.__file__).parent / "demo", copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    weights = copy / "model.safetensors"
    deeper = tuple(f"model.layers.{block}." for block in range(1, config["num_hidden_layers"]))
    tensors = {name: value for name, value in load_file(weights).items() if not name.startswith(deeper)}
    save_file(tensors, weights, metadata={"format": "pt"})
    return copy


def nan_head(folder: Path) -> Path:
    """A copy of the embedded model whose losses are not finite: one entry of its final norm is NaN."""
    import torch
    from safetensors.torch import load_file, save_file

    import hizoo_lite

    copy = folder / "nan-model"
    shutil.copytree(Path(hizoo_lite.__file__).parent / "demo", copy)
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], float("nan"))
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy
