"""Where an export is made: beside its place, by one process at a time, and renamed when it is whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hizoo_lite import locks
from hizoo_lite.checkpoints.writer import named_errors
from hizoo_lite.errors import UserError
from hizoo_lite.files import storage_errors


def find_place(out: Path | str) -> Path:
    """`out` with all links followed. UserError if that is no folder, and none can be made there."""
    try:
        place = Path(out).resolve()
    except (OSError, RuntimeError) as error:
        raise UserError(f"--out: {out} leads nowhere: {error}") from error
    if link := next((path for path in (place, *place.parents) if path.is_symlink()), None):
        raise UserError(f"--out: {out} leads nowhere: {link} is a link to itself")  # Python 3.13 says nothing
    above = place
    with named_errors(Path(out), "looked at"):
        while not above.exists():
            above = above.parent
    if not above.is_dir():
        within = "" if above == place else f"; no folder can be made in it, and so not {out}"
        raise UserError(f"--out: {above} is a file{within}; allowed: a new or empty folder")
    return place


def check_empty(place: Path, allowed: str = "a new or empty folder") -> None:
    """UserError if there is something in the folder that `find_place` gave."""
    if place.exists() and any(place.iterdir()):
        raise UserError(f"--out: {place} is not empty; allowed: {allowed}")


def check_new(place: Path, allowed: str = "a new or empty folder") -> None:
    """UserError unless a folder can be renamed to the one that `find_place` gave."""
    check_empty(place, allowed)
    if place == Path.cwd().resolve():
        raise UserError(f"--out: {place} is the folder that you are in; allowed: another one, or one in it")
    if place.is_mount():
        raise UserError(f"--out: {place} is where a disk is mounted; allowed: a folder in it")


@contextmanager
def workplace(place: Path) -> Iterator[Path]:
    """A folder beside `place`, empty but for its lock, that is gone afterwards; no other process has it.

    What an export that was killed has left of it is removed. UserError if another process exports to
    `place` now, and if the folder cannot be made; later failures to write are a `StorageError`.
    """
    path = place.with_name(f".{place.name}.work")
    with named_errors(place.parent):
        path.mkdir(parents=True, exist_ok=True)
    busy = f"--out: another export into {place} is under way; wait for it, end it, or use another folder"
    with locks.held(path, busy), storage_errors(place):
        try:
            _empty(path)
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)
    if path.exists():  # Windows removes no file that is open, such as the lock
        with suppress(OSError):
            path.rmdir()


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name == locks.NAME:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            os.unlink(path)
