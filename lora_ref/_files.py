"""Atomic writes: a file is written beside its place, then renamed into it."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A binary file to write to, which takes the place of `path` when the `with` ends without an error.

    The bytes go to a temporary file in the same directory, are flushed to the disk, and the file is renamed. After an
    error, a kill or a power cut at any moment `path` is the old file, whole, or the new one.

    Args:
        path: the file; a symbolic link is followed, and its target replaced.

    Yields:
        The temporary file, open for writing.

    Raises:
        OSError: as the system gives it; `path` is unchanged.
    """
    path = Path(path).resolve()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(content: object, path: str | os.PathLike) -> None:
    """Write `content` as JSON, in UTF-8, atomically.

    Args:
        content: what the `json` module can write.
        path: the file, as in `atomic_write`.

    Raises:
        TypeError: the content has a value that JSON cannot hold; `path` is unchanged.
        ValueError: the content has a number that JSON cannot hold (NaN, infinity); `path` is unchanged.
        OSError: as the system gives it; `path` is unchanged.
    """
    data = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    with atomic_write(path) as file:
        file.write(data.encode())
