"""``include/uapi/linux/liveupdate.h`` of Linux 7.3, and the same calls as messages on a socket.

The calls have type 0xBA and no size or direction in their numbers; each structure begins with its
own size, as the caller knows it (luo-mainline 4.2).

On a socket (``SOCK_SEQPACKET``) a call is one packet, little-endian as memory is: the number, u32,
and the structure. With it goes, as a descriptor, one end of a socket pair for the answer, so that
processes which share a session cannot take each other's, and then the file, if there is one. The
answer is one packet: 0 or a negative errno, s32; after 0 the structure as the kernel leaves it,
after an error what the kernel would write into its log. A descriptor that the call makes goes with
it; the number in the structure's ``fd`` means nothing on this side.

:data:`OPEN` and :data:`LIST` are ours.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from typing import Final

__all__ = [
    "CREATE_SESSION",
    "FILE",
    "FINISH",
    "GET_NAME",
    "LIST",
    "MAX_STRUCTURE",
    "NAMED",
    "NAME_LENGTH",
    "NODE",
    "OPEN",
    "PLAIN",
    "PRESERVE_FD",
    "RETRIEVE_FD",
    "RETRIEVE_SESSION",
    "address",
    "receive",
    "send",
]

NODE: Final = "/dev/liveupdate"

#: Bytes of a session's name, with the NUL at its end.
NAME_LENGTH: Final = 64

CREATE_SESSION: Final = 0xBA00
RETRIEVE_SESSION: Final = 0xBA01
PRESERVE_FD: Final = 0xBA40
RETRIEVE_FD: Final = 0xBA41
FINISH: Final = 0xBA42
GET_NAME: Final = 0xBA43

#: Ours: open the node, on a connection that was just made. No structure.
OPEN: Final = 0x4C00
#: Ours: which sessions and files there are, open or not: JSON in a memfd. No structure.
LIST: Final = 0x4C01

#: size, fd or reserved, name.
NAMED: Final = struct.Struct(f"=Ii{NAME_LENGTH}s")
#: size, fd, token.
FILE: Final = struct.Struct("=IiQ")
#: size, reserved.
PLAIN: Final = struct.Struct("=Ii")

#: Bytes of a structure that a packet may have: as many as a page, though all known ones are small.
MAX_STRUCTURE: Final = 4096

_PATH_LIMIT: Final = 107  # bytes in a socket's address


@contextlib.contextmanager
def address(path: str) -> Iterator[str]:
    """Give the name by which a socket at *path* is bound or connected, however long *path* is."""
    if len(os.fsencode(path)) <= _PATH_LIMIT:
        yield path
        return
    above = os.open(os.path.dirname(path) or ".", os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{above}/{os.path.basename(path)}"
    finally:
        os.close(above)


def send(peer: socket.socket, packet: bytes, fds: Sequence[int] = (), flags: int = 0) -> None:
    """Send *packet* with descriptors.

    Raises:
        OSError: EBADF if one of them is none; EPIPE, ECONNRESET if nobody is there.
    """
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    peer.sendmsg([packet], rights, flags | socket.MSG_NOSIGNAL)


def receive(peer: socket.socket, nbytes: int, nr_fds: int) -> tuple[bytes, list[int], int]:
    """Receive a packet of up to *nbytes* with up to *nr_fds* descriptors.

    Returns:
        the packet, empty at the end; its descriptors, which are the caller's to close; flags: with
        ``MSG_TRUNC`` the packet was longer, with ``MSG_CTRUNC`` there were more descriptors, or
        this process may not have any more.
    """
    packet, rights, flags, _ = peer.recvmsg(
        nbytes, socket.CMSG_LEN(4 * nr_fds), socket.MSG_CMSG_CLOEXEC
    )
    fds = array.array("i")
    for level, kind, data in rights:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) // fds.itemsize * fds.itemsize])
    return packet, fds.tolist(), flags
