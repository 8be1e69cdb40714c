"""Kernels with sessions of memfds, which the second process imports by name."""

import hashlib
import json
import os
from pathlib import Path

from luo.kernel import Kernel
from luo.machine import DeviceTree, Machine
from luo.memfd import memfd_handler


def machine(memory="64MiB"):
    """Return a machine without devices."""
    return Machine(memory, DeviceTree())


def plain(machine, max_order=0):
    """Return a kernel that keeps memfds."""
    return Kernel(machine, file_handlers=[memfd_handler(max_order)])


def told(fd):
    """Return what there is to know of a file; JSON values."""
    import fcntl

    size = os.fstat(fd).st_size
    return {
        "size": size,
        "pos": os.lseek(fd, 0, os.SEEK_CUR),
        "seals": fcntl.fcntl(fd, fcntl.F_GET_SEALS),
        "sha256": hashlib.sha256(os.pread(fd, size + 1, 0)).hexdigest(),
    }


class Retrieving(Kernel):
    """Retrieves everything as soon as it has booted, and says so in a file; then keeps it again."""

    def __init__(self, machine, out, name):
        super().__init__(machine, file_handlers=[memfd_handler()])
        self._out = Path(out)
        self._name = name

    def take_over(self, plan, verify=False):
        """Boot, and do it."""
        kernel = super().take_over(plan, verify)
        found = {}
        with self.liveupdate.open() as node:
            session = node.retrieve_session(self._name)
            files = {file.token: session.retrieve(file.token) for file in session.files}
            for token, fd in files.items():
                found[token] = told(fd)
            session.close()
            self.kept = node.create_session(self._name)
            for token, fd in files.items():
                self.kept.preserve(fd, token)
        self._out.write_text(
            json.dumps(
                {"pid": os.getpid(), "files": found, "left": kernel.kho.incoming.nr_unrestored}
            )
        )
        return kernel


def retrieving(machine, out, name):
    """Return such a kernel."""
    return Retrieving(machine, out, name)
