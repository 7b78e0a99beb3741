"""scratch_file, scratch_folder: temporary files of this process, in a folder of its own.

Knows nothing of what is in them. Invariant: what a killed process has left goes when the next one
makes its folder, and what a living one has stays: each holds a lock on its own, which ends with it
and is seen from other containers.
"""

import atexit
import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator

_UNLOCKED, _LOCKED = "diccae-new-", "diccae-scratch-"
_LOCK = "lock"

_making = threading.Lock()
_folders: dict[tuple[int, str], str] = {}
"""By process, since a forked one has its parent's, and the place of temporary files."""


def scratch_file(suffix: str = "") -> tuple[int, str]:
    """A new file: its descriptor and path, as of mkstemp; who asked for it deletes it."""
    with told_if_full(tempfile.gettempdir()):
        return tempfile.mkstemp(suffix=suffix, dir=_folder())


def scratch_folder() -> "tempfile.TemporaryDirectory[str]":
    """A new folder, for as long as its block lasts, or it is held."""
    with told_if_full(tempfile.gettempdir()):
        return tempfile.TemporaryDirectory(dir=_folder())


@contextlib.contextmanager
def told_if_full(place: str) -> Iterator[None]:
    """A block that writes to a place. Raises: OSError that names it, if there is no room."""
    try:
        yield
    except OSError as error:
        is_told = isinstance(error.__cause__, OSError)  # By a block within this one.
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or is_told:
            raise
        said = f"{os.strerror(error.errno)} for {place}: make room there"
        temporary = tempfile.gettempdir()
        # A store or run below it stays where it is, whatever TMPDIR says.
        own = [f"{temporary}/{prefix}" for prefix in (_LOCKED, _UNLOCKED)]
        if place == temporary or place.startswith(tuple(own)):
            said += ", or name another folder for temporary files with TMPDIR"
        raise OSError(error.errno, said) from error


def _folder() -> str:
    with _making:
        key = os.getpid(), tempfile.gettempdir()
        # Whoever cleans up temporary files may have taken it.
        if key not in _folders or not os.path.isdir(_folders[key]):
            _remove_stale(key[1])
            _folders[key] = _locked_folder()
            atexit.register(_remove_own, _folders[key], os.getpid())
        return _folders[key]


def _locked_folder() -> str:
    folder = tempfile.mkdtemp(prefix=_UNLOCKED)
    # Never closed: that would be the end of the lock.
    lock = os.open(f"{folder}/{_LOCK}", os.O_CREAT | os.O_RDWR)
    with contextlib.suppress(OSError):  # No locks on this file system: nobody takes it for stale.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    locked = folder.replace(_UNLOCKED, _LOCKED)
    os.rename(folder, locked)
    return locked


def _remove_own(folder: str, pid: int) -> None:
    if os.getpid() == pid:  # A forked process ends with its parent's words, too.
        shutil.rmtree(folder, ignore_errors=True)


def _remove_stale(place: str) -> None:
    """Folders that no process holds any more."""
    for name in os.listdir(place):
        if not name.startswith(_LOCKED):
            continue
        folder = f"{place}/{name}"
        # It is held, another user's, or another process removes it.
        with contextlib.suppress(OSError):
            lock = os.open(f"{folder}/{_LOCK}", os.O_RDWR)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)
