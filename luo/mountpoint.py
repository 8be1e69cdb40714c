"""Mount points whose process was killed: how one is found, cleared, and kept from staying.

Also a program, ``python luo/mountpoint.py DIR``: waits for the end of its standard input, whose
other end a mounting process holds, and clears DIR if the mount has died with it. It imports nothing
of ours, so that it starts quickly. (FUSE's option ``auto_unmount`` is meant for the same; with that
of libfuse 3.14.0 two of 25 killed mounts stayed.)
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import subprocess
import sys
from collections.abc import Iterator

__all__ = ["clear", "guarded", "is_dead"]

_MNT_DETACH = 2


def is_dead(directory: str) -> bool:
    """Return whether a mount without a process is in the way at *directory*."""
    try:
        os.stat(directory)
    except OSError as error:  # ECONNABORTED if the connection ends at this very moment
        return error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    return False


def clear(directory: str) -> bool:
    """Unmount *directory*, also if it is dead or in use; return whether that was done."""
    if ctypes.CDLL(None).umount2(os.fsencode(directory), _MNT_DETACH) == 0:
        return True
    try:  # who is not root
        command = ["fusermount3", "-u", "-z", directory]
        return not subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def guarded(directory: str) -> Iterator[None]:
    """Have *directory* cleared if this process is killed while the block runs."""
    command = [sys.executable, "-I", "-S", __file__, directory]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True):
        yield


if __name__ == "__main__":
    sys.stdin.buffer.read()
    if is_dead(sys.argv[1]):
        clear(sys.argv[1])
