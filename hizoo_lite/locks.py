"""One process at a time in a folder, by `filelock`: the system ends such a lock with its process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from hizoo_lite.errors import UserError

#: The file in a folder that is locked; it stays there, empty.
NAME = ".lock"


@contextmanager
def held(folder: Path, busy: str) -> Iterator[None]:
    """While this is open, no other process holds the folder, which is there and may be removed meanwhile.

    UserError with the message `busy` if one does.
    """
    path = folder / NAME
    try:
        lock = FileLock(path)
        lock.acquire(blocking=False)
    except Timeout as error:
        raise UserError(busy) from error
    except OSError as error:
        raise UserError(f"--out: {path} cannot be written: {error.strerror or error}") from error
    try:
        if not path.exists():  # removed by the one that held it until now
            raise UserError(busy)
        yield
    finally:
        lock.release()
