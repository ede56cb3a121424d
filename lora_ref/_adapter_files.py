"""The two files of an adapter, replaced together: no kill at any moment mixes an old one with a new one.

Both are written into a folder inside the adapter's directory and renamed from there, an old configuration that differs
being moved away first: the directory then holds the old pair, the new pair, or no configuration, which readers refuse.

Saves to one directory take turns. The lock is a file outside of it: the directory must hold the adapter alone, and its
parent may be read-only. It is in the machine's temporary directory, in a folder that only this user can open (in one
that all users share, anybody could hold our locks or put links in their place), named by a hash of the real path. The
system drops it when the process that holds it ends, however it ends. Such a lock does not reach other users, other
machines that see the directory over NFS, or processes with another TMPDIR. They do not wait for us, so their work must
be left alone: the name of a save's folder carries the identity of the lock that the save held, and only folders made
under the lock that we hold now are removed, for their saves are over. Without a lock nothing is removed.
"""

import contextlib
import hashlib
import os
import platform
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
TEMP_PREFIX = ".saving-"  # begins the name of the folder that a save writes in
PREVIOUS_CONFIG = "old_config.json"  # in that folder: the configuration that the save moved away


def write_pair(directory: Path, tensors: bytes, config: bytes) -> None:
    """Write both files to `directory`, made if need be, as the head of this module says."""
    directory.mkdir(parents=True, exist_ok=True)
    content = {TENSORS: tensors, CONFIG: config}
    with _temporary_folder(directory) as folder:
        for name, data in content.items():
            with open(folder / name, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        with contextlib.suppress(FileNotFoundError):
            if (directory / CONFIG).read_bytes() != config:
                os.replace(directory / CONFIG, folder / PREVIOUS_CONFIG)
        for name in content:
            os.replace(folder / name, directory / name)


def unfinished_save(directory: Path) -> Path | None:
    """The folder of a save that took the configuration away and did not bring the new one, if there is one."""
    if os.path.exists(directory / CONFIG):
        return None
    cut_short = [
        folder
        for folder in directory.glob(TEMP_PREFIX + "*")
        if os.path.exists(folder / CONFIG)
        and (os.path.lexists(folder / PREVIOUS_CONFIG) or not os.path.exists(folder / TENSORS))
    ]
    return max(cut_short, default=None)  # their names begin with the time


@contextlib.contextmanager
def _temporary_folder(directory: Path) -> Iterator[Path]:
    """A folder to write the files in. It is removed at the end, unless it has what the directory now lacks."""
    with _lock(directory) as identity:
        folder = Path(tempfile.mkdtemp(prefix=f"{TEMP_PREFIX}{time.time_ns()}-{identity}-", dir=directory))
        try:
            yield folder
        finally:
            if os.path.lexists(folder / PREVIOUS_CONFIG) and os.path.exists(folder / TENSORS):  # old tensors in place
                os.replace(folder / PREVIOUS_CONFIG, directory / CONFIG)
            if unfinished_save(directory) != folder:
                shutil.rmtree(folder, ignore_errors=True)
        for left in directory.glob(f"{TEMP_PREFIX}*-{identity}-*") if identity else ():
            shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def _lock(directory: Path) -> Iterator[str]:
    """Hold the directory's lock, after waiting for it; yields its identity, "" where no lock can be had."""
    import filelock  # a hundredth of a second, which `import lora_ref` need not take

    identity, lock = "", contextlib.nullcontext()
    with contextlib.suppress(OSError, NotImplementedError):  # no right to write there, a file system without locks, …
        if filelock.FileLock is not filelock.SoftFileLock:  # a soft lock would outlive a killed process
            path = _lock_folder() / f"{hashlib.sha256(os.fsencode(directory.resolve())).hexdigest()}.lock"
            lock = filelock.FileLock(path).acquire()
            identity = _identity(path)
    with lock:  # released by name, not by closing it alone: a process forked meanwhile may have it open too
        yield identity


def _identity(path: Path) -> str:
    """A name for the lock file at this path, which no other has: of its machine, device and inode."""
    found = os.stat(path)
    return hashlib.sha256(f"{platform.node()} {found.st_dev} {found.st_ino}".encode()).hexdigest()[:16]


def _lock_folder() -> Path:
    """The folder of this user's locks; PermissionError where another user has made it."""
    if not hasattr(os, "getuid"):  # Windows, where each user has a temporary directory
        folder = Path(tempfile.gettempdir(), "lora_ref-locks")
        folder.mkdir(exist_ok=True)
        return folder
    folder = Path(tempfile.gettempdir(), f"lora_ref-locks-{os.getuid()}")
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = os.lstat(folder)  # not of what a link points to
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise PermissionError(f"{folder} is not a directory that only this user can write to")
    return folder
