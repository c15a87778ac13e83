"""One run at a time for a model file, and one process at a time that reads images."""

import contextlib
import os
import socket
import time
from collections.abc import Iterator

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from support.console import say

LATE = 5  # seconds after which is said for whom a process waits


class Lock:
    """Refuses a second run on the same model file inside its `with` block; the lock ends with its process.

    `missing` is a sentence that says why the file cannot be locked, or None.

    Raises:
        BlockingIOError: if another run holds it.
        OSError: if it cannot be made.
    """

    def __init__(self, path: str):
        folder, name = os.path.split(os.path.realpath(path))
        self.path, self.handle, self.missing = os.path.join(folder, f".{name}.lock"), None, None
        while self.handle is None:
            try:
                handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            except OSError as error:
                raise OSError(error.errno, error.strerror, path) from None
            try:
                if fcntl is None:
                    raise OSError("this system has no locks for files")
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = os.read(handle, 200).decode(errors="replace") or "unknown"
                os.close(handle)
                raise BlockingIOError(
                    f"{path} is being trained by another run ({owner}); wait for it, stop it, or choose another --model"
                ) from None
            except OSError as error:
                self.missing = f"{path} cannot be locked ({error}); make sure that no other run trains it"
            if _is_at(handle, self.path):
                self.handle = handle
            else:  # its owner has just removed it
                os.close(handle)
        os.ftruncate(self.handle, 0)
        os.write(self.handle, f"process {os.getpid()} on {socket.gethostname()}".encode())

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.release()

    def release(self) -> None:
        """Removes the lock."""
        with contextlib.suppress(OSError):
            os.unlink(self.path)
            os.close(self.handle)


def _is_at(handle, path):
    """Whether the open file is the one at a path; yes where files have no numbers to tell them apart."""
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    return there.st_ino == 0 or os.path.samestat(os.fstat(handle), there)


@contextlib.contextmanager
def taking_turns(path: str, seconds: float = 3600) -> Iterator[bool]:
    """Only one process, of one or several machines, is inside the block for the same file; the others wait, and say so.

    Where there are no locks, or no folder for them, nobody waits.

    Yields:
        Whether another process was inside before.
    """
    begun, lock, said, waited = time.monotonic(), None, False, False
    while lock is None and (passed := time.monotonic() - begun) < seconds:
        try:
            lock = Lock(path)
        except BlockingIOError:
            waited = True
            if passed > LATE and not said:
                say(f"waiting for another process, which writes {path}")
                said = True
            time.sleep(0.2)
        except OSError:
            break
    try:
        yield waited
    finally:
        if lock:
            lock.release()
