"""A memfd that outlives the kernel: preserved in a session, retrieved by the next kernel.

    python examples/first_session.py

The agent in here is mainline's user space in a few lines: it opens the device node, keeps a
session open, and after the jump takes the same bytes back. The next kernel runs in a second
process; the device node is a socket, which the agent opens again as it would after a reboot.
"""

import os
import tempfile
from pathlib import Path

import luo
from luo.client import LiveUpdate
from luo.device_node import ControlSocket

GUEST_RAM = 1


def kernel(machine: luo.Machine) -> luo.Kernel:
    """Build a kernel that keeps memfds."""
    return luo.Kernel(machine, file_handlers=[luo.memfd_handler()])


def main() -> None:
    """Keep a guest's memory across a change of kernel."""
    machine = luo.Machine("256MiB")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "liveupdate")
        with ControlSocket(path) as socket:
            socket.offer(machine)
            old = kernel(machine).boot()

            ram = os.memfd_create("guest-ram", os.MFD_ALLOW_SEALING)
            os.truncate(ram, 64 << 20)
            os.pwrite(ram, b"a guest's byte", 42 << 20)
            with LiveUpdate.open(path) as node:
                session = node.create_session("vm-1")  # open until the jump
            session.preserve_fd(ram, GUEST_RAM)
            os.pwrite(ram, b"written later!", 42 << 20)  # guests run until the jump

            old.kexec_load(luo.KernelImage("first_session:kernel"))
            new = old.kexec()  # freezes, jumps; what this kernel gave out is gone

            with LiveUpdate.open(path) as node:
                session = node.retrieve_session("vm-1")
            again = session.retrieve_fd(GUEST_RAM)
            session.finish()
            session.close()
            print(f"{os.fstat(again).st_size >> 20} MiB came back:", end=" ")
            print(os.pread(again, 14, 42 << 20).decode())
            new.close()


if __name__ == "__main__":
    main()
