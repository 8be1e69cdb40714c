"""Kernels with sessions for tests, and a rig: a machine whose node is a socket, and its jumps."""

import contextlib
import os
from dataclasses import replace
from pathlib import Path

from luo.client import LiveUpdate
from luo.device_node import ControlSocket
from luo.files import FileHandler
from luo.flb import Flb
from luo.kernel import Kernel, KernelImage
from luo.machine import Machine

MAGIC = 0xFEED_F00D_CAFE_BEE0


def memfd(content=b"", name="test"):
    """Return a new memfd that holds *content*, at its start."""
    fd = os.memfd_create(name)
    os.pwrite(fd, content, 0)
    return fd


def content(fd):
    """Return what is in a file, from its start."""
    return os.pread(fd, os.fstat(fd).st_size + 1, 0)


# ---- a handler that knows nothing of pages ----


def _is_memfd(fd):
    return os.readlink(f"/proc/self/fd/{fd}").startswith("/memfd:")


def _preserve(args):
    text = content(args.file)
    args.data = args.kho.alloc_preserve(8 + len(text))
    args.memory.view(args.data, 8 + len(text))[:] = len(text).to_bytes(8, "little") + text


def _unpreserve(args):
    args.kho.unpreserve_free(args.data)


def _retrieve(args):
    length = int.from_bytes(args.memory.view(args.data, 8), "little")
    args.file = memfd(bytes(args.memory.view(args.data + 8, length)))


def _finish(args):
    args.incoming.restore_free(args.data)


def copies(**callbacks):
    """Return a handler that keeps a copy of what is in a memfd."""
    given = {
        "compatible": "copy-v1",
        "can_preserve": _is_memfd,
        "preserve": _preserve,
        "unpreserve": _unpreserve,
        "retrieve": _retrieve,
        "finish": _finish,
    }
    return FileHandler(**{**given, **callbacks})


def with_copies(machine, **callbacks):
    """Return a kernel that keeps copies."""
    return Kernel(machine, file_handlers=[copies(**callbacks)])


# ---- objects that belong to files ----


def magic_flbs(log):
    """Return three FLBs with a number each; the file *log* tells what they are called for."""

    def make(place):
        def note(event):
            def callback(args):
                if event == "preserve":
                    args.data = MAGIC + place
                if event == "retrieve":
                    args.obj = args.data
                with Path(log).open("a") as file:
                    file.write(f"{event} {place} {args.data:x} {args.obj}\n")

            return callback

        events = ("preserve", "unpreserve", "retrieve", "finish")
        return Flb(f"magic-{place}", **{event: note(event) for event in events})

    return tuple(map(make, range(3)))


def with_flbs(machine, log):
    """Return a kernel whose files depend on three FLBs."""
    return Kernel(machine, file_handlers=[replace(copies(), flbs=magic_flbs(log))])


def slow(machine, began, gate):
    """Return a kernel whose freeze waits for a file *gate*; one called *began* says so."""

    def freeze(args):
        Path(began).touch()
        while not Path(gate).exists():
            pass

    return with_copies(machine, freeze=freeze)


# ---- a machine ----


class Host:
    """A machine with a control socket; its kernels are all of one image.

    Attributes:
        path: of the socket.
        kernel: the one that runs.
    """

    def __init__(self, path, image, in_process, memory="256MiB"):
        self.path = str(path)
        self._image = image
        self._in_process = in_process
        self.machine = Machine(memory)
        self.control = ControlSocket(self.path)
        self.control.offer(self.machine)
        self.kernel = image.build(self.machine).boot()

    def kexec(self):
        """Jump into the next kernel."""
        in_process = self._in_process
        self.kernel.kexec_load(self._image.build(self.machine) if in_process else self._image)
        self.kernel = self.kernel.kexec()

    def open(self):
        """Open the node."""
        return LiveUpdate.open(self.path)

    def listed(self):
        """Return names of outgoing and incoming sessions, and tokens of their files."""
        told = LiveUpdate.list_sessions(self.path)
        return [
            {one["name"]: [file["token"] for file in one["files"]] for one in told[kind]}
            for kind in ("outgoing", "incoming")
        ]

    def close(self):
        """Switch it off."""
        self.control.close()
        self.kernel.close()


@contextlib.contextmanager
def host(path, image, in_process=True, **kwargs):
    """Have a machine run while the block does; in the second process if not *in_process*."""
    running = Host(path, image, in_process, **kwargs)
    try:
        if not in_process:
            running.kexec()
        yield running
    finally:
        running.close()


COPIES = KernelImage("session_kernels:with_copies")
MEMFDS = KernelImage("luo.drivers:kernel", args={"memfd": True})
