"""Makes a shape with luo: real memfds, preserved in sessions of a kernel that is about to jump."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from dataclasses import replace

import pytest
from shapes import FLBS, PAGE, File, Shape

from luo import Kernel
from luo.files import FileHandler
from luo.flb import Flb, FlbArgs
from luo.image.boot import virt_machine
from luo.memfd import memfd_handler

MFD_ALLOW_SEALING = 2


def flb(name: str, data: int) -> Flb:
    """An FLB of the kernel's test, which is nothing but its number."""

    def preserve(args: FlbArgs) -> None:
        args.data = data

    def retrieve(args: FlbArgs) -> None:
        assert args.data == data
        args.obj = name

    return Flb(name, preserve, lambda args: None, retrieve, lambda args: None)


def memfd(file: File) -> int:
    """A memfd of this process."""
    fd = os.memfd_create("luo", MFD_ALLOW_SEALING)
    os.ftruncate(fd, file.size)
    content = file.content
    for page in range(0 if file.nothing else file.nr_pages):
        if page not in file.holes:
            os.pwrite(fd, content[page * PAGE : (page + 1) * PAGE], page * PAGE)
    if file.seals:
        try:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, file.seals)
        except OSError as error:
            os.close(fd)
            pytest.skip(f"this host's memfds do not take seals {file.seals:#x}: {error}")
    os.lseek(fd, file.pos, os.SEEK_SET)
    return fd


def handler_of(max_order: int, flbs: bool) -> FileHandler:
    """A handler of memfds, whose folios are of that order at most."""
    given = tuple(flb(name, data) for name, data in FLBS) if flbs else ()
    return replace(memfd_handler(max_order), flbs=given)


@contextlib.contextmanager
def kernel_of(shape: Shape) -> Iterator[Kernel]:
    """A kernel that has preserved everything of *shape*."""
    orders = {file.order for files in shape.sessions.values() for file in files}
    cmdline = "kho=on liveupdate=on"
    kernel = Kernel(
        virt_machine(ranges=shape.ranges),
        arch="arm64",
        kho_abi="kho-v4",
        release="luo",
        cmdline=cmdline,
        file_handlers=[handler_of(max(orders, default=0), shape.flbs)],
    )
    kernel.boot()
    with kernel.liveupdate.open() as node:
        for name, files in shape.sessions.items():
            session = node.create_session(name)
            for file in files:
                fd = memfd(file)
                try:
                    session.preserve(fd, file.token)
                finally:
                    os.close(fd)
    yield kernel
    kernel.shutdown()
