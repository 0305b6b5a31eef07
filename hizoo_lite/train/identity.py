"""run.json: what a run was made of, so that it does not go on with other data, another task or model.

Settings are compared by `config_file.check_same_run`; here it is what their paths lead to. A few kilobytes of
every large file are looked at, so that it costs milliseconds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from hizoo_lite.base import Example, UserError
from hizoo_lite.files import parse_json
from hizoo_lite.tasks import Splits, Task
from hizoo_lite.tasks.task import WHERE

#: What each entry is of, for messages.
_WORDS = {
    "train": "--data: the training examples",
    "dev": "--data: the dev examples",
    "test": "--data: the test examples",
    "task": "--task: its prompts, answers or metrics",
    "model": "--model: its weights",
    "tokenizer": "--model: its tokenizer",
    "library": "--device: what it is computed with",
}
_TOKENIZER_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens*",
    "chat_template*",
    "*.model",
)
#: A large file is looked at in so many places, so many bytes each.
_SAMPLES, _SAMPLE_BYTES = 256, 4096


def of_run(splits: Splits, task: Task, model: str, tokenizer: Path, library: str) -> dict[str, str]:
    """The entries of run.json.

    model: a hash of the weights. tokenizer: the folder with its files. library: `Stepper.library`.
    """
    return {
        **{name: _of_examples(getattr(splits, name)) for name in ("train", "dev", "test")},
        "task": _of_task(task),
        "model": model,
        "tokenizer": of_files(path for pattern in _TOKENIZER_FILES for path in tokenizer.glob(pattern)),
        "library": library,
    }


def read(path: Path) -> dict[str, str]:
    """The entries of a run.json; none where there is no such file. UserError where it is not sound."""
    if not path.is_file():  # made by an earlier version, or killed before its first step
        return {}
    try:
        return {str(name): str(value) for name, value in parse_json(path.read_text(encoding="utf-8")).items()}
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"{path}: cannot be read: {error}; without the file nothing is compared") from error


def check(path: Path, found: Mapping[str, str]) -> None:
    """UserError naming everything in `found` that a run.json has otherwise."""
    stored = read(path)
    other = [
        words
        for name, words in _WORDS.items()
        if name in stored and name in found and stored[name] != found[name]
    ]
    if other:
        raise UserError(
            f"{path}: the run was begun with others than are here now:\n  "
            + "\n  ".join(other)
            + "\nput them back; other ones need a run of their own (--out)"
        )


def of_files(paths: Iterable[Path]) -> str:
    """A hash of files' names, sizes and contents, large ones by samples."""
    digest = hashlib.sha256()
    for path in sorted(set(paths)):
        if path.is_file():
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
            digest.update(_sample(path))
    return digest.hexdigest()


def _sample(path: Path) -> bytes:
    size = path.stat().st_size
    if size <= _SAMPLES * _SAMPLE_BYTES:
        return path.read_bytes()
    with path.open("rb") as file:
        found = []
        for number in range(_SAMPLES):
            file.seek(number * (size - _SAMPLE_BYTES) // (_SAMPLES - 1))
            found.append(file.read(_SAMPLE_BYTES))
    return b"".join(found)


def _of_examples(examples: Sequence[Example]) -> str:
    """In their order; where their files lie does not count."""
    digest = hashlib.sha256()
    for example in examples:
        fields = sorted((name, value) for name, value in example.fields.items() if name != WHERE)
        digest.update(repr((fields, *example[1:])).encode())
    return digest.hexdigest()


def _of_task(task: Task) -> str:
    """What is written, read and scored; how files are read shows in the examples."""
    parts = (
        *(task.kind, task.causal, task.masked, task.text, task.text_pair, task.num_labels, task.cut),
        *(task.cut_side, task.stop, task.max_new_tokens, task.chat, list(task.scorers)),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()
