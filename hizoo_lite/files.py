"""Small files, replaced as a whole: a reader sees the old content or the new one, also after a power cut."""

from __future__ import annotations

import json
import os
import re
import shutil
import tomllib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from hizoo_lite.errors import StorageError, UserError
from hizoo_lite.units import format_bytes

#: Of a JSON file that is read: no record and no tokenizer's settings are larger.
_MOST_BYTES = 64 << 20
_MOST_NAME_BYTES = 255  # of a part of a path


def write_text(path: Path, text: str) -> None:
    """Replace a file; it is on disk when this returns. OSError, with the old file kept, if that fails."""
    beside = temporary_path(path)
    try:
        with open(beside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        sync_folder(path.parent)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """While this is open, a failure to write is a `StorageError` that names the file, or else `path`."""
    try:
        yield
    except OSError as error:
        where = error.filename or path
        raise StorageError(f"{where}: cannot be written: {error.strerror or error}") from error


def temporary_path(path: Path) -> Path:
    """Where a file is written before it is renamed."""
    return path.with_name(f".{path.name}.tmp")


def sync_file(path: Path) -> None:
    """Force a file's content to the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames last, if the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_space(folder: Path, needed_bytes: int) -> None:
    """UserError if the disk of `folder`, which need not exist, has no room for so much."""
    parent = folder.absolute()
    while not parent.exists():
        parent = parent.parent
    free_bytes = shutil.disk_usage(parent).free
    if free_bytes < needed_bytes:
        needed, free = format_bytes(needed_bytes), format_bytes(free_bytes)
        raise UserError(
            f"--out: {needed} are needed at {folder}, {free} are free; make room or choose another disk"
        )


def parse_json(text: str | bytes, **options: Any) -> Any:
    """`json.loads` of what others may have written: ValueError also if it is nested too deeply."""
    try:
        return json.loads(text, **options)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def parse_toml(text: str) -> dict[str, Any]:
    """`tomllib.loads` of what others may have written: ValueError also if it is nested too deeply."""
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def parse_yaml(text: str) -> dict[str, Any]:
    """The YAML of what others may have written: ValueError for what is no mapping of names.

    Numbers, dates and such are texts as they are written: YAML 1.1 takes 010 for 8, 1:30 for 90, on for true.
    Values are texts, true, false, null, lists and mappings.
    """
    import yaml  # on its own it is a tenth of a second, and few have YAML

    tags = "tag:yaml.org,2002:"

    class Loader(yaml.SafeLoader):
        """Without aliases, which can make a small text a huge value, and with every key once."""

        yaml_constructors: ClassVar[dict[Any, Any]] = {
            tag: make
            for tag, make in yaml.SafeLoader.yaml_constructors.items()
            if tag in (None, *(f"{tags}{name}" for name in ("str", "bool", "null", "seq", "map")))
        }
        yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {
            sign: [(f"{tags}{tag}", re.compile(rf"(?:{pattern})\Z"))]
            for signs, tag, pattern in (
                ("tTfF", "bool", "true|True|TRUE|false|False|FALSE"),
                ("~nN", "null", "~|null|Null|NULL"),
                (("",), "null", ""),
            )
            for sign in signs
        }

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise ValueError("aliases (*name) are not taken; write the value again")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            pairs = node.value if isinstance(node, yaml.MappingNode) else ()
            counts = Counter(key.value for key, _ in pairs if isinstance(key, yaml.ScalarNode))
            if twice := next((key for key, count in counts.items() if count > 1), None):
                raise ValueError(f"the key {twice!r} is there twice")
            return super().construct_mapping(node, deep)

    try:
        found = Loader(text).get_single_data()
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except (yaml.YAMLError, OverflowError) as error:
        raise ValueError(" ".join(str(error).split())) from error
    except (LookupError, AttributeError, TypeError) as error:  # what PyYAML's own conversions raise
        raise ValueError(f"a value is not what its tag, such as !!bool, says: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise ValueError(f"got {found!r:.80}, wanted are lines such as `steps: 500`")
    return found


def is_unicode(text: str) -> bool:
    """Whether no character is half of a surrogate pair.

    JSON can write such halves, and Python makes them of a command's bytes that are not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_inside(name: object) -> bool:
    """Whether this is a file's name, with `/` between its parts, that stays in its folder on every system."""
    if not isinstance(name, str) or not name.isprintable() or any(sign in name for sign in "\\:"):
        return False
    path = PurePosixPath(name)
    short = all(len(part.encode()) <= _MOST_NAME_BYTES for part in path.parts) and len(path.parts) < 99
    return short and bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def read_json(path: Path, wanted: str) -> dict[str, Any]:
    """The object in a file, which is `wanted`. UserError naming it if it is missing or something else."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise UserError(f"{path}: {path.stat().st_size} bytes; allowed: {wanted}, at most {_MOST_BYTES}")
        value = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; allowed: {wanted}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); allowed: {wanted}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: got a {type(value).__name__}, allowed: {wanted}")
    return value
