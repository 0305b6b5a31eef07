"""run.json: what a run was made of, so that it does not go on with other data, another task or model.

Its settings are there too, for `config_file.check_same_run`; here it is what their paths lead to. Small files
and weights are looked at as a whole, of large ones samples, so that it costs seconds at most.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hizoo_lite.batch import Example
from hizoo_lite.checkpoints.fingerprint import of_files, of_weights, weight_files
from hizoo_lite.errors import UserError
from hizoo_lite.files import parse_json
from hizoo_lite.noise import GENERATORS
from hizoo_lite.tasks import Splits, Task
from hizoo_lite.tasks.task import ABOUT, ROW

if TYPE_CHECKING:
    import torch

#: What each entry is of, for messages.
_WORDS = {
    "train": "--data: the training examples",
    "dev": "--data: the dev examples",
    "test": "--data: the test examples",
    "task": "--task: its prompts, answers or metrics",
    "objective": "--objective: the function, or the file it is in",
    "rows": "--data: the columns of the training examples that only the objective is given",
    "model": "--model: its weights",
    "weights": "--model: its weights",
    "model_config": "--model: its config.json",
    "tokenizer": "--model: its tokenizer",
    "library": "--device: what it is computed with",
    "noise": "--device: the generator that draws the noise of the weights",
}
#: What rounds, and may be another one.
_ROUNDING = {"gpu": "the GPU", "torch": "torch", "cuda": "CUDA"}
#: What drew the noise of weights on a GPU when its generator was not written down.
_NOISE_BEFORE = "torch-cuda"
_TOKENIZER_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens*",
    "chat_template*",
    "*.model",
)
_MODEL_CONFIG = "config.json"


def of_run(splits: Splits, task: Task, model: str, folder: Path, library: str) -> dict[str, str]:
    """The entries of run.json.

    model: a hash of what is computed. folder: with the tokenizer's files, and with the model's if they
    are there. library: `Stepper.library`.
    """
    return {
        **{name: _of_examples(getattr(splits, name)) for name in ("train", "dev", "test")},
        "task": _of_task(task),
        "model": model,
        **of_model(folder),
        "tokenizer": of_files(path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern)),
        "library": library,
    }


def of_device(device: torch.device, drawn: bool) -> dict[str, str]:
    """The entries that are of a GPU, none of a CPU: its name and the libraries that choose its kernels.

    drawn: whether it draws the noise of the weights; then the name of the generator is one of them.
    """
    from hizoo_lite.device import is_gpu, kind_of, like

    if not is_gpu(device):
        return {}
    kind = kind_of(device)
    noise = {"noise": GENERATORS[like(device)]} if drawn else {}
    return {"gpu": str(kind.name(device)), **kind.libraries(), **noise}


def changes(path: Path, found: Mapping[str, str]) -> list[str]:
    """What a run.json has otherwise than `found` and only rounds otherwise, in words."""
    stored = read(path)
    return [
        f"{words}: the run was begun with {stored[name]}, this is {found[name]}"
        for name, words in _ROUNDING.items()
        if name in stored and name in found and stored[name] != found[name]
    ]


def of_model(folder: Path) -> dict[str, str]:
    """The entries that are of a model's own files; a folder with a graph has no weights.

    UserError, naming the file, if one is not valid.
    """
    found = {"model_config": of_files([folder / _MODEL_CONFIG])}
    files = weight_files(folder)
    if all(path.is_file() for path in files):
        found["weights"] = of_weights(files)
    return found


def read(path: Path) -> dict[str, str]:
    """The entries of a run.json; none if there is no such file. UserError if it is not valid."""
    if not path.is_file():  # made by an earlier version, or killed before its first step
        return {}
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
        return {name: str(value) for name, value in found.items() if not isinstance(value, dict)}
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"{path}: cannot be read: {error}; without the file nothing is compared") from error


def check(path: Path, found: Mapping[str, str]) -> None:
    """UserError naming everything in `found` that a run.json has otherwise."""
    stored = read(path)
    if stored and "noise" in found:
        stored.setdefault("noise", _NOISE_BEFORE)
    other = [
        words
        for name, words in _WORDS.items()
        if name in stored and name in found and stored[name] != found[name]
    ]
    if other:
        raise UserError(
            f"{path}: the run was begun with others than are here now:\n  "
            + "\n  ".join(dict.fromkeys(other))
            + "\nput them back; other ones need a run of their own (--out)"
        )


def _of_examples(examples: Sequence[Example]) -> str:
    """In their order; where their files lie does not count."""
    digest = hashlib.sha256()
    for example in examples:
        fields = sorted((name, value) for name, value in example.fields.items() if name not in ABOUT)
        digest.update(repr((fields, *example[1:])).encode())
    return digest.hexdigest()


def of_rows(examples: Sequence[Example]) -> str:
    """The entry of the rows that examples were made of, for an objective that is given them."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr(sorted(example.fields[ROW].items(), key=repr)).encode("utf-8", "backslashreplace"))
    return digest.hexdigest()


def _of_task(task: Task) -> str:
    """What is written, read and scored; how files are read shows in the examples."""
    if len(task.parts) > 1:
        return hashlib.sha256("".join(map(_of_task, task.parts)).encode()).hexdigest()
    parts = (
        *(task.kind, task.causal, task.masked, task.text, task.text_pair, task.num_labels, task.cut),
        *(task.cut_side, task.stop, task.max_new_tokens, task.chat, list(task.scorers)),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()
