"""Mainline's sessions and files, one sentence of luo-mainline.md section 4 a test."""

import errno
import functools
import os
import struct
import threading
import time

import pytest
import session_rig as rig
from rig import errno_of
from session_model import INTERRUPT, Handler, Raises, Thing, answer_data
from session_rig import short, updated

from luo import abi
from luo.errors import CallbackError, KernelPanic, StateError, SuccessorError
from luo.fdt import Fdt
from luo.files import FileHandler
from luo.kernel import Kernel

ALL = frozenset({"freeze", "unfreeze", "can_finish", "get_id"})
MEMORY = Handler("memory-v1", frozenset({"memory"}), ALL)
VFIO = Handler("vfio-v1", frozenset({"vfio"}))
BOTH = Handler("both-v1", frozenset({"memory", "vfio"}), ALL)


@functools.cache
def memory(number, identity=None):
    """A file that MEMORY preserves."""
    return Thing("memory", number if identity is None else identity, number)


@functools.cache
def vfio(number):
    """A file that VFIO preserves, which has no get_id."""
    return Thing("vfio", "all the same", number)


@pytest.fixture
def recorder():
    """What callbacks were made."""
    return rig.Recorder()


def booted(recorder, handlers=(MEMORY,), flbs=(), **kwargs):
    """Return a kernel that runs on a machine of its own."""
    return rig.booted(recorder, handlers, flbs, **kwargs)


def luo_pages(kernel):
    """Blocks that the kernel preserves beside those of one without sessions."""
    return kernel.kho.nr_preserved - Kernel(rig.machine()).boot().kho.nr_preserved


def head_of(kernel, handover=None):
    """The address of LUO's 32 bytes."""
    return rig.walked(kernel.memory, handover or kernel.kho.handover()).subtrees["LUO"][0]


def u64(kernel, phys):
    """Read a number of the machine's memory."""
    return struct.unpack("<Q", rig.reader(kernel.memory)(phys, 8))[0]


def put(kernel, phys, data):
    """Write into the machine's memory: bytes, or a number."""
    raw = struct.pack("<Q", data) if isinstance(data, int) else data
    kernel.memory.view(phys, len(raw))[:] = raw


def at_handover(kernel, change):
    """Let *change(head, handover)* edit what *kernel* hands over."""
    kernel.on_handover = lambda handover: change(head_of(kernel, handover), handover)


# ---- boot and device node (4.1) ----


@pytest.mark.parametrize("cmdline", ["kho=on", "kho=on liveupdate=off", "kho=off liveupdate=on"])
def test_without_live_update_there_is_no_node(recorder, cmdline):
    kernel = booted(recorder, cmdline=cmdline)

    assert not kernel.liveupdate.enabled
    assert errno_of(kernel.liveupdate.open) == errno.ENODEV


def test_a_kernel_without_handlers_has_no_node():
    kernel = Kernel(rig.machine()).boot()

    assert not kernel.liveupdate.enabled
    assert errno_of(kernel.liveupdate.open) == errno.ENODEV
    assert "LUO" not in rig.walked(kernel.memory, kernel.kho.handover()).subtrees


def test_no_handler_at_all_is_still_a_node(recorder):
    kernel = booted(recorder, ())

    with kernel.liveupdate.open() as node, node.create_session("a") as session:
        assert errno_of(session.preserve, memory(1), 0) == errno.ENOENT


def test_the_head_is_there_from_boot(recorder):
    kernel = booted(recorder)
    head = rig.reader(kernel.memory)(head_of(kernel), 32)
    compatible, number, sessions, flbs = struct.unpack("<8sQQQ", head)

    assert compatible == b"luo-v5\0\0"
    assert (number, sessions) == (1, 0)
    assert rig.reader(kernel.memory)(flbs, 4096) == struct.pack("<QQ", 1, 0).ljust(4096, b"\0")
    assert luo_pages(kernel) == 2


def test_updates_are_counted(recorder):
    kernel = booted(recorder)
    for number in range(4):
        assert kernel.liveupdate.liveupdate_num == number
        assert u64(kernel, head_of(kernel) + 8) == number + 1
        kernel = updated(kernel, recorder, (MEMORY,))


def test_an_update_counts_without_any_session(recorder):
    kernel = updated(booted(recorder), recorder, (MEMORY,))

    with kernel.liveupdate.open() as node:
        assert errno_of(node.retrieve_session, "a") == errno.ENOENT
    assert kernel.liveupdate.incoming == ()


def test_only_one_opens_the_node(recorder):
    live = booted(recorder).liveupdate
    with live.open():
        assert errno_of(live.open) == errno.EBUSY
    with live.open() as node:
        node.create_session("a")


def test_sessions_outlive_the_node(recorder):
    kernel = booted(recorder)
    with kernel.liveupdate.open() as node:
        session = node.create_session("a")
    session.preserve(memory(1), 1)

    assert [each.name for each in kernel.liveupdate.outgoing] == ["a"]


def test_closing_the_node_twice_does_not_let_two_in(recorder):
    live = booted(recorder).liveupdate
    first = live.open()
    first.close()
    with live.open():
        first.close()
        assert errno_of(live.open) == errno.EBUSY


# ---- what a successor does with what it finds (4.1) ----


def filled(recorder, sessions=1, files=1):
    """Return a kernel with so many sessions of so many files, and the names."""
    kernel = booted(recorder)
    with kernel.liveupdate.open() as node:
        for number in range(sessions):
            session = node.create_session(f"s{number}")
            for token in range(files):
                session.preserve(memory(1000 * number + token), token)
    return kernel


def shorten(kernel, head, handover):
    """Say that LUO's blob is 31 bytes."""
    page = kernel.memory.view(handover.fdt_phys, 4096)
    Fdt(page).set_property_inplace("/LUO", "blob-size", struct.pack("<Q", 31))


#: What is written where, by what is wrong then: kernel, address of LUO's head, handover.
DAMAGES = {
    "31 bytes": shorten,
    "compatible": lambda kernel, head, _: put(kernel, head, b"luo-v4"),
    "shorter compatible": lambda kernel, head, _: put(kernel, head, b"luo-v\0"),
    "longer compatible": lambda kernel, head, _: put(kernel, head, b"luo-v55"),
    "cycle": lambda kernel, head, _: put(kernel, u64(kernel, head + 16), u64(kernel, head + 16)),
    "no records": lambda kernel, head, _: put(kernel, u64(kernel, head + 16) + 8, 0),
    "52 records": lambda kernel, head, _: put(kernel, u64(kernel, head + 16) + 8, 52),
    "2^64 records": lambda kernel, head, _: put(kernel, u64(kernel, head + 16) + 8, (1 << 64) - 1),
    "block outside memory": lambda kernel, head, _: put(kernel, head + 16, 1 << 50),
    "next outside memory": lambda kernel, head, _: put(kernel, u64(kernel, head + 16), 1 << 63),
    "block not aligned": lambda kernel, head, _: put(kernel, head + 16, b"\x08"),
}


def damaged(recorder, what):
    """Return a kernel that hands over something wrong."""
    kernel = filled(recorder)
    at_handover(kernel, lambda head, handover: DAMAGES[what](kernel, head, handover))
    return kernel


@pytest.mark.parametrize("cmdline", ["kho=on liveupdate=on", "kho=on liveupdate=off"])
@pytest.mark.parametrize("what", DAMAGES)
def test_what_is_wrong_is_a_panic_even_with_live_update_off(recorder, what, cmdline):
    kernel = damaged(recorder, what)

    with pytest.raises(KernelPanic):
        updated(kernel, recorder, (MEMORY,), preflight=False, cmdline=cmdline)


@pytest.mark.parametrize("what", DAMAGES)
def test_a_successor_that_looks_first_refuses_and_all_goes_on(recorder, what):
    kernel = damaged(recorder, what)
    session = kernel.liveupdate.outgoing[0]
    recorder.begin()

    with pytest.raises(SuccessorError, match="LUO"):
        updated(kernel, recorder, (MEMORY,))
    assert short(recorder) == ["FREEZE memory-v1 0", "UNFREEZE memory-v1 0"]
    session.preserve(memory(7), 7)
    session.close()


@pytest.mark.parametrize("what", DAMAGES)
def test_with_kho_off_nobody_looks(recorder, what):
    kernel = updated(damaged(recorder, what), recorder, cmdline="liveupdate=on", preflight=False)

    assert not kernel.liveupdate.enabled


def test_what_stands_behind_the_end_of_compatible_is_not_read(recorder):
    kernel = filled(recorder)
    at_handover(kernel, lambda head, _: put(kernel, head, b"luo-v5\0x"))

    assert updated(kernel, recorder, (MEMORY,)).liveupdate.liveupdate_num == 1


def test_a_page_of_flbs_that_is_the_head_itself(recorder):
    kernel = filled(recorder)
    at_handover(kernel, lambda head, _: (put(kernel, head + 24, head), put(kernel, head + 8, 0)))
    live = updated(kernel, recorder, (MEMORY,)).liveupdate

    with live.open() as node:
        node.retrieve_session("s0").close()


def test_too_long_a_chain_is_a_panic(recorder, monkeypatch):
    kernel = filled(recorder, sessions=103, files=0)
    monkeypatch.setattr(abi, "KHO_BLOCKS_MAX", 2)

    with pytest.raises(KernelPanic):
        updated(kernel, recorder, (MEMORY,), preflight=False)


def test_good_data_with_live_update_off_stays_preserved(recorder):
    kernel = filled(recorder, sessions=52, files=64)
    kept = luo_pages(kernel)
    _, beside = rig.beside()
    off = updated(kernel, recorder, (), cmdline="kho=on")

    assert errno_of(off.liveupdate.open) == errno.ENODEV
    assert off.kho.incoming.nr_unrestored == beside + kept
    assert "LUO" not in rig.walked(off.memory, off.kho.handover()).subtrees
    last = updated(off, recorder, (MEMORY,))
    assert last.liveupdate.liveupdate_num == 0
    with last.liveupdate.open():
        assert last.liveupdate.incoming == ()


def test_what_is_read_is_freed(recorder):
    kernel = updated(filled(recorder, sessions=52, files=64), recorder, (MEMORY,))
    _, beside = rig.beside()
    assert kernel.kho.incoming.nr_unrestored == beside + 2 + 52 * 2  # head and FLBs are free

    with kernel.liveupdate.open() as node:
        assert kernel.kho.incoming.nr_unrestored == beside + 52 * 2
        for number in range(52):
            node.retrieve_session(f"s{number}").close()
    assert kernel.kho.incoming.nr_unrestored == beside
    assert kernel.liveupdate.incoming == ()


# ---- what the first opener finds (4.1, 4.5) ----


def first_session(kernel, head):
    """The address of the first session's record."""
    return u64(kernel, head + 16) + 16


def first_file(kernel, head):
    """The address of the record of its first file."""
    return u64(kernel, first_session(kernel, head) + 64) + 16


#: What is wrong in the records: kernel, address of LUO's head.
BROKEN = {
    "too few files": lambda kernel, head: put(kernel, first_session(kernel, head) + 72, 1),
    "too many files": lambda kernel, head: put(kernel, first_session(kernel, head) + 72, 3),
    "2^64 files": lambda kernel, head: put(kernel, first_session(kernel, head) + 72, (1 << 64) - 1),
    "files outside memory": lambda kernel, head: put(
        kernel, first_session(kernel, head) + 64, 1 << 50
    ),
    "block without files": lambda kernel, head: put(kernel, first_file(kernel, head) - 8, 0),
    "block of 64 files": lambda kernel, head: put(kernel, first_file(kernel, head) - 8, 64),
    "cycle": lambda kernel, head: put(
        kernel, first_file(kernel, head) - 16, first_file(kernel, head) - 16
    ),
    "handler": lambda kernel, head: put(kernel, first_file(kernel, head), b"memory-v2"),
    "handler without end": lambda kernel, head: put(kernel, first_file(kernel, head), b"m" * 48),
    "no handler": lambda kernel, head: put(kernel, first_file(kernel, head), bytes(48)),
    "same name": lambda kernel, head: put(kernel, first_session(kernel, head) + 80, b"s0\0"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_wrong_in_a_record_is_eio_for_ever(recorder, what):
    kernel = filled(recorder, sessions=2, files=2)
    at_handover(kernel, lambda head, handover: BROKEN[what](kernel, head))
    live = updated(kernel, recorder, (MEMORY,)).liveupdate
    recorder.begin()

    assert [errno_of(live.open) for _ in range(3)] == [errno.EIO] * 3
    live.register_handler(recorder.handler(Handler("memory-v2", frozenset())))
    assert errno_of(live.open) == errno.EIO
    assert recorder.calls == []


def test_a_handler_may_come_before_the_first_opener(recorder):
    live = updated(filled(recorder), recorder, ()).liveupdate
    live.register_handler(recorder.handler(MEMORY))

    with live.open() as node:
        assert node.retrieve_session("s0").files[0].token == 0


def test_a_handler_may_not_come_after_it(recorder):
    live = updated(filled(recorder), recorder, ()).liveupdate
    assert errno_of(live.open) == errno.EIO
    live.register_handler(recorder.handler(MEMORY))

    assert errno_of(live.open) == errno.EIO


def test_without_files_their_count_is_not_read(recorder):
    kernel = filled(recorder, files=0)
    at_handover(kernel, lambda head, _: put(kernel, first_session(kernel, head) + 72, 5))
    live = updated(kernel, recorder, (MEMORY,)).liveupdate

    with live.open() as node:
        assert node.retrieve_session("s0").files == ()


def test_a_name_without_end_is_cut(recorder):
    kernel = filled(recorder)
    at_handover(kernel, lambda head, _: put(kernel, first_session(kernel, head), b"n" * 64))
    live = updated(kernel, recorder, (MEMORY,)).liveupdate

    with live.open() as node:
        assert node.retrieve_session("n" * 63).name == "n" * 63


# ---- CREATE_SESSION, RETRIEVE_SESSION (4.2) ----


@pytest.mark.parametrize("name", ["a", "x" * 63, "ü" * 31, "with space", "s/../x", b"bytes"])
def test_names_that_are_taken(recorder, name):
    kernel = booted(recorder)
    with kernel.liveupdate.open() as node:
        session = node.create_session(name)

    assert session.name == (name if isinstance(name, str) else name.decode())


@pytest.mark.parametrize("name", ["", "x" * 64, "x" * 1000, "ü" * 32, b"", b"x" * 64])
def test_names_of_no_or_over_63_bytes(recorder, name):
    kernel = booted(recorder)
    with kernel.liveupdate.open() as node:
        assert errno_of(node.create_session, name) == errno.EINVAL
    assert kernel.liveupdate.outgoing == ()
    assert luo_pages(kernel) == 2


def test_a_name_is_there_once(recorder):
    with booted(recorder).liveupdate.open() as node:
        session = node.create_session("a")
        assert errno_of(node.create_session, "a") == errno.EEXIST
        session.close()
        node.create_session("a")


def test_incoming_names_do_not_clash(recorder):
    kernel = updated(filled(recorder), recorder, (MEMORY,))
    with kernel.liveupdate.open() as node:
        node.create_session("s0")
        node.retrieve_session("s0")

    assert [len(kernel.liveupdate.outgoing), len(kernel.liveupdate.incoming)] == [1, 1]


@pytest.mark.parametrize("name", ["nobody", "", "x" * 64, "s", "s00"])
def test_nobody_of_that_name(recorder, name):
    with updated(filled(recorder), recorder, (MEMORY,)).liveupdate.open() as node:
        assert errno_of(node.retrieve_session, name) == errno.ENOENT


def test_an_outgoing_session_is_not_retrieved(recorder):
    with booted(recorder).liveupdate.open() as node:
        node.create_session("a")
        assert errno_of(node.retrieve_session, "a") == errno.ENOENT


def test_a_session_is_retrieved_once(recorder):
    with updated(filled(recorder), recorder, (MEMORY,)).liveupdate.open() as node:
        session = node.retrieve_session("s0")
        assert errno_of(node.retrieve_session, "s0") == errno.EINVAL
        session.close()
        assert errno_of(node.retrieve_session, "s0") == errno.ENOENT


@pytest.mark.parametrize("count", [1, 50, 51, 52, 102, 103])
def test_a_block_has_51_sessions(recorder, count):
    kernel = filled(recorder, sessions=count, files=0)

    assert luo_pages(kernel) == 2 + -(-count // 51)


@pytest.mark.parametrize("count", [1, 62, 63, 64, 126, 127])
def test_a_block_has_63_files(recorder, count):
    kernel = filled(recorder, files=count)

    assert luo_pages(kernel) == 3 + -(-count // 63)


def test_blocks_go_with_their_records(recorder):
    kernel = filled(recorder, sessions=103, files=0)
    with kernel.liveupdate.open() as node:
        for left in range(102, -1, -1):
            kernel.liveupdate.outgoing[0].close()
            assert luo_pages(kernel) == 2 + -(-left // 51)
        node.create_session("a")


def test_there_are_as_many_sessions_as_blocks_have(recorder, monkeypatch):
    monkeypatch.setattr(abi, "KHO_BLOCKS_MAX", 2)
    kernel = filled(recorder, sessions=102, files=0)

    with kernel.liveupdate.open() as node:
        assert errno_of(node.create_session, "more") == errno.ENOSPC
        assert errno_of(node.create_session, "s0") == errno.ENOSPC  # before it looks at names
        assert luo_pages(kernel) == 4
        kernel.liveupdate.outgoing[50].close()
        node.create_session("more")


def test_there_are_as_many_files_as_blocks_have(recorder, monkeypatch):
    monkeypatch.setattr(abi, "KHO_BLOCKS_MAX", 2)
    kernel = filled(recorder, files=126)
    session = kernel.liveupdate.outgoing[0]
    recorder.begin()

    assert errno_of(session.preserve, memory(999), 999) == errno.ENOSPC
    assert errno_of(session.preserve, memory(999), 5) == errno.EEXIST  # before it looks for room
    assert recorder.calls == []
    assert luo_pages(kernel) == 5


def test_a_name_that_is_taken_leaves_no_block(recorder):
    kernel = filled(recorder, sessions=51, files=0)
    with kernel.liveupdate.open() as node:
        assert errno_of(node.create_session, "s0") == errno.EEXIST
    assert luo_pages(kernel) == 3

    with updated(kernel, recorder, (MEMORY,)).liveupdate.open() as node:
        node.retrieve_session("s50")


def fill_memory(kernel):
    """Leave no page free; returns what frees them again."""
    memory, taken = kernel.memory, []
    for order in range(memory.max_order, -1, -1):
        while not errno_of(lambda order=order: taken.append(memory.alloc_folio(order))):
            pass
    return lambda: [memory.free(phys) for phys in taken]


def test_without_memory_there_is_no_session(recorder):
    kernel = booted(recorder)
    give_back = fill_memory(kernel)
    with kernel.liveupdate.open() as node:
        assert errno_of(node.create_session, "a") == errno.ENOMEM
        give_back()
        node.create_session("a")


def test_without_memory_no_file_is_asked_about(recorder):
    kernel = filled(recorder, files=63)
    session = kernel.liveupdate.outgoing[0]
    give_back = fill_memory(kernel)
    recorder.begin()

    assert errno_of(session.preserve, memory(999), 999) == errno.ENOMEM
    assert recorder.calls == []
    give_back()
    session.preserve(memory(999), 999)


# ---- PRESERVE_FD (4.2) ----


@pytest.fixture
def kernel(recorder):
    """A kernel that has MEMORY, VFIO and BOTH, and two FLBs of VFIO."""
    return booted(recorder, (MEMORY, VFIO, BOTH), [(VFIO, "iommu"), (VFIO, "pci")])


@pytest.fixture
def outgoing(kernel):
    """A session of that kernel."""
    with kernel.liveupdate.open() as node:
        return node.create_session("vm")


def test_the_first_handler_that_says_yes_gets_it(recorder, outgoing):
    outgoing.preserve(vfio(1), 1)

    assert short(recorder) == [
        "CAN_PRESERVE memory-v1 ?",
        "CAN_PRESERVE vfio-v1 ?",
        "PRESERVE iommu",
        "PRESERVE pci",
        "PRESERVE vfio-v1 1",
    ]
    assert [each.handler.compatible for each in outgoing.files] == ["vfio-v1"]


def test_nobody_wants_it(recorder, outgoing):
    assert errno_of(outgoing.preserve, Thing("socket", 0), 0) == errno.ENOENT
    assert short(recorder) == [
        "CAN_PRESERVE memory-v1 ?",
        "CAN_PRESERVE vfio-v1 ?",
        "CAN_PRESERVE both-v1 ?",
    ]


def test_a_token_is_there_once_and_nobody_is_asked(recorder, outgoing):
    outgoing.preserve(memory(1), 7)
    recorder.begin()

    assert errno_of(outgoing.preserve, memory(1), 7) == errno.EEXIST
    assert errno_of(outgoing.preserve, Thing("socket", 0), 7) == errno.EEXIST
    assert recorder.calls == []


@pytest.mark.parametrize("token", [0, 1, (1 << 64) - 1])
def test_tokens_are_u64(outgoing, token):
    outgoing.preserve(memory(1), token)

    assert outgoing.files[0].token == token


@pytest.mark.parametrize("token", [-1, 1 << 64])
def test_other_tokens_are_none(outgoing, token):
    with pytest.raises((OverflowError, OSError)):
        outgoing.preserve(memory(1), token)
    assert outgoing.files == ()


def test_a_token_is_of_its_session(recorder):
    with booted(recorder).liveupdate.open() as node:
        for name in "ab":
            node.create_session(name).preserve(memory(name), 1)


def test_a_file_is_preserved_once_anywhere(recorder):
    with booted(recorder).liveupdate.open() as node:
        first, second = node.create_session("a"), node.create_session("b")
        first.preserve(memory(1), 1)
        recorder.begin()
        assert errno_of(first.preserve, memory(1), 2) == errno.EBUSY
        assert errno_of(second.preserve, memory(1), 1) == errno.EBUSY
        assert short(recorder) == ["CAN_PRESERVE memory-v1 ?"] * 2
        first.close()
        second.preserve(memory(1), 1)


def test_get_id_says_what_is_the_same_file(recorder, outgoing):
    outgoing.preserve(memory(1, identity="inode"), 1)

    assert errno_of(outgoing.preserve, memory(2, identity="inode"), 2) == errno.EBUSY
    outgoing.preserve(vfio(1), 3)
    outgoing.preserve(vfio(2), 4)
    assert errno_of(outgoing.preserve, vfio(2), 5) == errno.EBUSY


def test_a_retrieved_file_is_preserved_again_after_finish_only(recorder):
    kernel = updated(filled(recorder), recorder, (MEMORY,))
    with kernel.liveupdate.open() as node:
        old, new = node.retrieve_session("s0"), node.create_session("s0")
        file = old.retrieve(0)
        assert errno_of(new.preserve, file, 0) == errno.EBUSY
        old.finish()
        new.preserve(file, 0)


@pytest.mark.parametrize(
    ("fails", "undone"),
    [
        (2, []),
        (3, ["UNPRESERVE iommu"]),
        (4, ["UNPRESERVE pci", "UNPRESERVE iommu"]),
    ],
)
@pytest.mark.parametrize("how", [-errno.ENODEV, Raises(errno.ENODEV)])
def test_a_failure_unwinds_in_reverse(recorder, kernel, outgoing, fails, undone, how):
    pages = luo_pages(kernel)
    recorder.begin({fails: how})

    with pytest.raises(CallbackError) as caught:
        outgoing.preserve(vfio(1), 1)
    assert caught.value.errno == errno.ENODEV
    assert caught.value.event == "PRESERVE"
    assert short(recorder)[fails + 1 :] == undone
    assert outgoing.files == ()
    assert luo_pages(kernel) == pages
    recorder.begin()
    outgoing.preserve(vfio(1), 1)


def test_the_error_names_handler_and_file(recorder, outgoing):
    recorder.begin({1: -errno.ENODEV})
    with pytest.raises(CallbackError, match=r"PRESERVE.*memory-v1.*vm/0x1f") as caught:
        outgoing.preserve(memory(1), 31)

    error = caught.value
    assert (error.kind, error.name, error.device) == ("file", "memory-v1", "vm/0x1f")


def test_an_incoming_session_takes_none(recorder):
    with updated(filled(recorder), recorder, (MEMORY,)).liveupdate.open() as node:
        session = node.retrieve_session("s0")
        recorder.begin()
        assert errno_of(session.preserve, memory(9), 9) == errno.EINVAL
        assert recorder.calls == []


def test_closing_unpreserves_in_reverse(recorder, kernel, outgoing):
    for token in (5, 3, 4):
        outgoing.preserve(vfio(token), token)
    recorder.begin()
    outgoing.close()

    assert short(recorder) == [
        "UNPRESERVE vfio-v1 4",
        "UNPRESERVE vfio-v1 3",
        "UNPRESERVE vfio-v1 5",
        "UNPRESERVE pci",
        "UNPRESERVE iommu",
    ]
    assert kernel.liveupdate.outgoing == ()
    assert luo_pages(kernel) == 2


def test_a_session_is_closed_once(recorder, outgoing):
    outgoing.preserve(memory(1), 1)
    outgoing.close()
    recorder.begin()
    outgoing.close()

    assert recorder.calls == []
    assert errno_of(outgoing.preserve, memory(1), 1) == errno.EBADF
    assert errno_of(outgoing.retrieve, 1) == errno.EBADF
    assert errno_of(outgoing.finish) == errno.EBADF


# ---- RETRIEVE_FD (4.2) ----


@pytest.fixture
def updated_kernel(recorder):
    """A kernel to which a session came over, with files 0, 1 and 2."""
    return updated(filled(recorder, files=3), recorder, (MEMORY,))


@pytest.fixture
def incoming(recorder, updated_kernel):
    """That session."""
    with updated_kernel.liveupdate.open() as node:
        session = node.retrieve_session("s0")
    recorder.begin()
    return session


def test_files_are_retrieved_in_any_order(recorder, incoming):
    for token in (2, 0, 1):
        assert incoming.retrieve(token).kind == "memory"

    assert short(recorder) == [f"RETRIEVE memory-v1 {token}" for token in (2, 0, 1)]


def test_the_second_time_it_is_the_same_file(recorder, incoming):
    assert incoming.retrieve(1) is incoming.retrieve(1)
    assert len(recorder.calls) == 1


def test_no_such_token(recorder, incoming):
    assert errno_of(incoming.retrieve, 3) == errno.ENOENT
    assert recorder.calls == []


@pytest.mark.parametrize(
    ("how", "code"), [(-errno.ENOMEM, errno.ENOMEM), (Raises(None), errno.EIO)]
)
def test_a_failed_retrieve_is_remembered(recorder, incoming, how, code):
    recorder.begin({0: how})

    assert [errno_of(incoming.retrieve, 1) for _ in range(3)] == [code] * 3
    assert short(recorder) == ["RETRIEVE memory-v1 1"]
    assert incoming.files[1].retrieve_status == -code
    incoming.retrieve(0)


def test_an_outgoing_session_gives_none_back(recorder, outgoing):
    outgoing.preserve(memory(1), 1)

    assert errno_of(outgoing.retrieve, 1) == errno.EINVAL
    assert errno_of(outgoing.finish) == errno.EINVAL


# ---- FINISH, and close of what came over (4.2) ----


def test_all_are_asked_then_finished_in_reverse_retrieved_or_not(recorder, incoming):
    incoming.retrieve(1)
    recorder.begin()
    incoming.finish()

    asked = [f"CAN_FINISH memory-v1 {token}" for token in (0, 1, 2)]
    assert short(recorder) == asked + [f"FINISH memory-v1 {token}" for token in (2, 1, 0)]
    assert [call.status for call in recorder.calls] == [0, 1, 0, 0, 1, 0]
    assert [call.file is None for call in recorder.calls[3:]] == [True, False, True]


def test_a_refusal_finishes_nothing(recorder, incoming):
    recorder.begin({1: False})

    assert errno_of(incoming.finish) == errno.EBUSY
    assert short(recorder) == ["CAN_FINISH memory-v1 0", "CAN_FINISH memory-v1 1"]
    assert len(incoming.files) == 3
    recorder.begin()
    incoming.finish()
    assert incoming.files == ()


def test_a_finished_session_stays_until_it_is_closed(recorder, updated_kernel, incoming):
    live = updated_kernel.liveupdate
    incoming.finish()
    assert [session.name for session in live.incoming] == ["s0"]
    assert errno_of(incoming.retrieve, 0) == errno.ENOENT
    recorder.begin()
    incoming.finish()
    incoming.close()

    assert recorder.calls == []
    assert live.incoming == ()


def test_closing_finishes(recorder, updated_kernel, incoming):
    incoming.close()

    assert [call.event for call in recorder.calls] == ["CAN_FINISH"] * 3 + ["FINISH"] * 3
    assert updated_kernel.liveupdate.incoming == ()


def test_a_session_that_may_not_finish_is_stuck_when_it_is_closed(
    recorder, updated_kernel, incoming
):
    live = updated_kernel.liveupdate
    recorder.begin({0: False})
    assert errno_of(incoming.close) == errno.EBUSY

    (stuck,) = live.incoming
    assert stuck.retrieved
    assert len(stuck.files) == 3
    with live.open() as node:
        assert errno_of(node.retrieve_session, "s0") == errno.EINVAL
    assert errno_of(incoming.finish) == errno.EBADF


def test_what_nobody_retrieved_is_not_carried_forward(recorder):
    kernel = updated(filled(recorder, sessions=2), recorder, (MEMORY,))
    with kernel.liveupdate.open() as node:
        node.retrieve_session("s1")
    recorder.begin()
    last = updated(kernel, recorder, (MEMORY,))

    assert recorder.calls == []
    with last.liveupdate.open():
        assert last.liveupdate.incoming == ()


# ---- the reboot path (4.3) ----


def several(recorder):
    """Return a kernel with sessions a, b, c of files 1 and 2 each."""
    kernel = booted(recorder)
    with kernel.liveupdate.open() as node:
        for name in "abc":
            session = node.create_session(name)
            for token in (1, 2):
                session.preserve(memory(f"{name}{token}"), token)
    recorder.begin()
    return kernel


def where(recorder):
    """The calls as "EVENT session token"."""
    return [f"{call.event} {call.session} {call.token}" for call in recorder.calls]


def test_without_an_image_nobody_is_frozen(recorder):
    kernel = several(recorder)

    assert errno_of(kernel.kexec) == errno.EINVAL
    assert recorder.calls == []


def test_sessions_and_files_are_frozen_in_their_order(recorder):
    updated(several(recorder), recorder, (MEMORY,))

    assert where(recorder) == [f"FREEZE {name} {token}" for name in "abc" for token in (1, 2)]


@pytest.mark.parametrize(
    ("fails", "undone"),
    [
        (0, []),
        (1, ["a 1"]),
        (2, ["a 1", "a 2"]),
        (5, ["c 1", "b 1", "b 2", "a 1", "a 2"]),
    ],
)
def test_a_failure_thaws_its_session_first_then_those_before_backwards(recorder, fails, undone):
    kernel = several(recorder)
    recorder.begin({fails: -errno.EAGAIN})

    with pytest.raises(CallbackError) as caught:
        updated(kernel, recorder, (MEMORY,))
    assert caught.value.errno == errno.EAGAIN
    assert caught.value.event == "FREEZE"
    assert where(recorder)[fails + 1 :] == [f"UNFREEZE {each}" for each in undone]
    assert u64(kernel, head_of(kernel) + 16) == 0
    recorder.begin()
    assert kernel.liveupdate.outgoing[0].files[0].token == 1
    updated(kernel, recorder, (MEMORY,))


def test_a_failure_leaves_no_record_behind(recorder):
    kernel = several(recorder)
    recorder.begin({5: -errno.EAGAIN})
    before = rig.walked(kernel.memory, kernel.kho.handover()).preserved
    with pytest.raises(CallbackError):
        updated(kernel, recorder, (MEMORY,))

    image = rig.walked(kernel.memory, kernel.kho.handover())
    assert image.preserved == before
    head = image.subtrees["LUO"][0]
    blob = rig.reader(kernel.memory)(u64(kernel, head + 24), 4096)
    assert blob == struct.pack("<QQ", 1, 0).ljust(4096, b"\0")
    named = [
        phys for phys, _ in image.preserved if b"memory-v1" in rig.reader(kernel.memory)(phys, 4096)
    ]
    assert named == []


def test_freeze_may_replace_the_data(recorder):
    kernel = several(recorder)
    preserved = [file.data for session in kernel.liveupdate.outgoing for file in session.files]
    recorder.begin()
    last = updated(kernel, recorder, (MEMORY,))
    with last.liveupdate.open():
        came = [file.data for session in last.liveupdate.incoming for file in session.files]

    assert came == [answer_data(call) for call in recorder.calls]
    assert came != preserved


def test_what_a_failed_freeze_set_is_not_kept(recorder):
    kernel = several(recorder)
    session = kernel.liveupdate.outgoing[0]
    preserved = session.files[0].data
    recorder.begin({0: -errno.EAGAIN})
    with pytest.raises(CallbackError):
        updated(kernel, recorder, (MEMORY,))

    assert session.files[0].data == preserved


def test_a_session_without_files(recorder):
    kernel = filled(recorder, files=0)
    seen = []
    at_handover(
        kernel,
        lambda head, _: seen.append(rig.reader(kernel.memory)(first_session(kernel, head), 80)),
    )
    with updated(kernel, recorder, (MEMORY,)).liveupdate.open() as node:
        assert node.retrieve_session("s0").files == ()
    assert seen == [b"s0".ljust(80, b"\0")]


def test_an_image_is_of_a_frozen_kernel_only_inside_frozen(recorder):
    kernel = several(recorder)
    with kernel.liveupdate.frozen():
        assert u64(kernel, head_of(kernel) + 16)
        assert all(call.event == "FREEZE" for call in recorder.calls)
    assert u64(kernel, head_of(kernel) + 16) == 0
    assert where(recorder)[6:] == [f"UNFREEZE {name} {token}" for name in "cba" for token in (1, 2)]


def test_the_old_kernel_is_gone(recorder):
    kernel = several(recorder)
    session = kernel.liveupdate.outgoing[0]
    node = kernel.liveupdate.open()
    updated(kernel, recorder, (MEMORY,))
    recorder.begin()

    for call, *arguments in (
        (node.create_session, "z"),
        (session.preserve, memory(9), 9),
        (kernel.liveupdate.open,),
        (kernel.liveupdate.register_handler, recorder.handler(VFIO)),
    ):
        with pytest.raises(StateError) as caught:
            call(*arguments)
        assert caught.value.errno == errno.ESHUTDOWN
    session.close()  # a process that ends closes what it has
    node.close()
    assert recorder.calls == []


# ---- handlers (4.4) ----


def test_a_compatible_string_is_there_once(recorder):
    live = booted(recorder).liveupdate
    same = rig.Recorder().handler(MEMORY)

    assert errno_of(live.register_handler, recorder.handler(MEMORY)) == errno.EEXIST
    assert errno_of(live.register_handler, same) == errno.EEXIST
    live.unregister_handler(recorder.handler(MEMORY))
    live.register_handler(same)


def test_handlers_are_refused_when_it_is_off(recorder):
    live = booted(recorder, cmdline="kho=on").liveupdate

    assert errno_of(live.register_handler, recorder.handler(VFIO)) == errno.EOPNOTSUPP


def test_a_handler_that_is_gone_is_not_asked(recorder):
    kernel = booted(recorder, (MEMORY, BOTH))
    kernel.liveupdate.unregister_handler(recorder.handler(MEMORY))
    with kernel.liveupdate.open() as node:
        node.create_session("a").preserve(memory(1), 1)

    assert short(recorder) == ["CAN_PRESERVE both-v1 ?", "PRESERVE both-v1 1"]


def test_a_handler_of_a_preserved_file_stays(recorder, kernel, outgoing):
    """Its module is pinned."""
    live = kernel.liveupdate
    outgoing.preserve(memory(1), 1)
    assert errno_of(live.unregister_handler, recorder.handler(MEMORY)) == errno.EBUSY
    outgoing.close()
    live.unregister_handler(recorder.handler(MEMORY))


@pytest.mark.parametrize("compatible", ["", "x" * 48, "ü" * 24, "a\0b"])
def test_compatible_strings_of_1_to_47_bytes(recorder, compatible):
    with pytest.raises((ValueError, OSError)):
        recorder.handler(Handler(compatible, frozenset()))


def test_47_bytes_come_over(recorder):
    longest = Handler("x" * 47, frozenset({"memory"}))
    kernel = booted(recorder, (longest,))
    with kernel.liveupdate.open() as node:
        node.create_session("a").preserve(memory(1), 1)
    with updated(kernel, recorder, (longest,)).liveupdate.open() as node:
        node.retrieve_session("a").retrieve(1)


# ---- faults of 7.3 that are not repeated unless asked for ----


def test_the_empty_block_of_7_3_is_a_panic_of_the_next_kernel(recorder):
    kernel = booted(recorder, quirks=["sessions-empty-block"])
    with kernel.liveupdate.open() as node:
        for number in range(51):
            node.create_session(f"s{number}")
        assert errno_of(node.create_session, "s0") == errno.EEXIST
        assert luo_pages(kernel) == 4

    with pytest.raises(SuccessorError, match="0 entries"):
        updated(kernel, recorder, (MEMORY,))
    kernel.liveupdate.outgoing[0].close()  # shrinks
    updated(kernel, recorder, (MEMORY,))


# ---- what a careless handler does ----


def careless(**callbacks):
    """A handler of everything that does nothing, but for *callbacks*."""
    nothing = dict.fromkeys(("preserve", "unpreserve", "retrieve", "finish"), lambda args: None)
    return FileHandler("x", **{"can_preserve": lambda file: True, **nothing, **callbacks})


def with_handler(handler, machine=None):
    """Return a kernel that has this handler and runs."""
    return Kernel(machine or rig.machine(), file_handlers=[handler]).boot()


@pytest.mark.parametrize("get_id", [lambda file: 1 // 0, lambda file: [], lambda file: {}])
def test_a_get_id_that_says_nothing_is_an_error_of_the_handler(get_id):
    with with_handler(careless(get_id=get_id)).liveupdate.open() as node:
        session = node.create_session("a")
        with pytest.raises(CallbackError, match="GET_ID") as caught:
            session.preserve(object(), 1)
    assert caught.value.errno == errno.EIO
    assert session.files == ()


@pytest.mark.parametrize("file", [None, 12345])
def test_a_retrieve_without_a_file_is_remembered(file):
    handler = careless(retrieve=lambda args: setattr(args, "file", file))
    kernel = with_handler(handler)
    with kernel.liveupdate.open() as node:
        node.create_session("a").preserve(object(), 1)
    kernel.kexec_load(Kernel(kernel.machine, file_handlers=[handler]))
    with kernel.kexec().liveupdate.open() as node:
        session = node.retrieve_session("a")
    codes = [errno_of(session.retrieve, 1) for _ in range(2)]

    assert codes == [errno.EIO if file is None else errno.EBADF] * 2
    assert session.files[0].file is None
    session.close()


@pytest.mark.parametrize("data", [-1, 1 << 64, "text", None])
def test_data_that_is_no_u64_is_an_error_of_the_handler(data):
    with with_handler(careless(preserve=lambda args: setattr(args, "data", data))) as kernel:
        with kernel.liveupdate.open() as node:
            session = node.create_session("a")
            assert errno_of(session.preserve, object(), 1) == errno.EIO
        assert session.files == ()


@pytest.mark.parametrize("event", ["unpreserve", "finish"])
def test_who_cannot_fail_and_does_is_noted(event):
    def fail(args):
        raise OSError(errno.EIO, "on purpose")

    handler = careless(**{event: fail}, retrieve=lambda args: setattr(args, "file", args))
    kernel = with_handler(handler)
    with kernel.liveupdate.open() as node:
        session = node.create_session("a")
        for token in range(3):
            session.preserve(object(), token)
    if event == "finish":
        kernel.kexec_load(Kernel(kernel.machine, file_handlers=[handler]))
        kernel = kernel.kexec()
        with kernel.liveupdate.open() as node:
            session = node.retrieve_session("a")
    session.close()

    problems = kernel.liveupdate.problems
    assert [problem.event for problem in problems] == [event.upper()] * 3
    assert [problem.device for problem in problems] == ["a/0x2", "a/0x1", "a/0x0"]
    assert (kernel.liveupdate.outgoing, kernel.liveupdate.incoming) == ((), ())
    assert luo_pages(kernel) == 2


def test_two_handlers_of_one_name_are_refused_before_boot(recorder):
    with pytest.raises(ValueError, match="two file handlers"):
        Kernel(rig.machine(), file_handlers=[careless(), careless()])
    with pytest.raises(TypeError):
        Kernel(rig.machine(), file_handlers=["x"])
    with pytest.raises(ValueError, match="kho-v4"):
        Kernel(rig.machine(), file_handlers=[], kho_abi="kho-v3")


@pytest.mark.parametrize("name", ["can_preserve", "preserve", "unpreserve", "retrieve", "finish"])
def test_five_callbacks_are_required(name):
    with pytest.raises(OSError, match=name) as caught:
        careless(**{name: None})
    assert caught.value.errno == errno.EINVAL


# ---- descriptors: LUO has a reference of its own ----


def nr_open(path):
    """How many descriptors of *path* there are."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:  # the one of the directory itself
            continue
    return found.count(str(path))


def test_luo_keeps_a_descriptor_of_its_own(tmp_path):
    path = tmp_path / "file"
    path.write_text("content")
    fd = os.open(path, os.O_RDONLY)
    with with_handler(careless()).liveupdate.open() as node:
        session = node.create_session("a")
    session.preserve(fd, 1)
    assert nr_open(path) == 2
    os.close(fd)
    assert os.pread(session.files[0].file, 7, 0) == b"content"
    session.close()
    assert nr_open(path) == 0


@pytest.mark.parametrize("event", ["can_preserve", "preserve", "get_id"])
@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, ""), ZeroDivisionError(), KeyboardInterrupt()]
)
def test_a_failure_leaves_no_descriptor(tmp_path, event, error):
    def fail(_):
        raise error

    path = tmp_path / "file"
    with path.open("w") as file, with_handler(careless(**{event: fail})).liveupdate.open() as node:
        session = node.create_session("a")
        with pytest.raises(BaseException):  # noqa: B017
            session.preserve(file.fileno(), 1)
        assert nr_open(path) == 1


def test_two_descriptors_of_one_file_are_one_file(tmp_path):
    path = tmp_path / "file"
    with path.open("w") as one, path.open("w") as two:
        with with_handler(careless()).liveupdate.open() as node:
            session = node.create_session("a")
        session.preserve(one.fileno(), 1)
        assert errno_of(session.preserve, two.fileno(), 2) == errno.EBUSY
        assert nr_open(path) == 3
        session.close()


def test_no_descriptor_is_ebadf_before_anybody_is_asked():
    asked = []
    with with_handler(careless(can_preserve=asked.append)).liveupdate.open() as node:
        session = node.create_session("a")
    assert errno_of(session.preserve, 12345, 1) == errno.EBADF
    assert errno_of(session.preserve, -1, 1) == errno.EBADF
    assert asked == []


def test_who_retrieves_gets_a_descriptor_of_his_own(tmp_path):
    path = tmp_path / "file"
    path.write_text("content")

    def retrieve(args):
        args.file = os.open(path, os.O_RDONLY)

    handler = careless(retrieve=retrieve)
    kernel = with_handler(handler)
    with kernel.liveupdate.open() as node:
        node.create_session("a").preserve(object(), 1)
    kernel.kexec_load(Kernel(kernel.machine, file_handlers=[handler]))
    with kernel.kexec().liveupdate.open() as node:
        session = node.retrieve_session("a")
    mine = [session.retrieve(1) for _ in range(3)]
    assert nr_open(path) == 4
    os.close(mine.pop())
    session.close()
    assert nr_open(path) == 2
    assert os.pread(mine[0], 7, 0) == b"content"
    for fd in mine:
        os.close(fd)


def test_a_kernel_that_goes_lets_go_of_its_descriptors(tmp_path):
    path = tmp_path / "file"
    with path.open("w") as file:
        kernel = with_handler(careless())
        with kernel.liveupdate.open() as node:
            node.create_session("a").preserve(file.fileno(), 1)
        kernel.kexec_load(Kernel(kernel.machine))
        kernel.kexec()
        assert nr_open(path) == 1


# ---- ^C, callbacks that call back, threads (ours) ----


@pytest.mark.parametrize("at", [0, 1, 2, 3, 4])
def test_an_interrupt_in_preserve_leaves_everything_as_it_was(recorder, kernel, outgoing, at):
    pages = luo_pages(kernel)
    recorder.begin({at: INTERRUPT})

    with pytest.raises(KeyboardInterrupt):
        outgoing.preserve(vfio(1), 1)
    assert outgoing.files == ()
    assert luo_pages(kernel) == pages
    outgoing.preserve(vfio(1), 1)
    outgoing.close()


@pytest.mark.parametrize("at", range(6))
def test_an_interrupt_in_freeze_thaws(recorder, at):
    kernel = several(recorder)
    recorder.begin({at: INTERRUPT})

    with pytest.raises(KeyboardInterrupt):
        updated(kernel, recorder, (MEMORY,))
    assert len(recorder.calls) == 2 * at + 1
    recorder.begin()
    updated(kernel, recorder, (MEMORY,))


def test_an_interrupt_while_it_closes_stops_nothing(recorder, kernel, outgoing):
    for token in range(3):
        outgoing.preserve(vfio(token), token)
    recorder.begin({1: INTERRUPT})

    with pytest.raises(KeyboardInterrupt):
        outgoing.close()
    assert [call.event for call in recorder.calls] == ["UNPRESERVE"] * 5
    assert kernel.liveupdate.outgoing == ()
    assert luo_pages(kernel) == 2


@pytest.mark.parametrize("at", range(6, 12))
def test_an_interrupt_in_unfreeze_is_heard_when_all_is_thawed(recorder, at):
    kernel = several(recorder)
    before = rig.walked(kernel.memory, kernel.kho.handover()).preserved
    recorder.begin({at: INTERRUPT})
    kernel.liveupdate.freeze()

    with pytest.raises(KeyboardInterrupt):
        kernel.liveupdate.unfreeze()
    assert [call.event for call in recorder.calls] == ["FREEZE"] * 6 + ["UNFREEZE"] * 6
    assert u64(kernel, head_of(kernel) + 16) == 0
    for phys, _ in before:
        assert b"memory-v1" not in rig.reader(kernel.memory)(phys, 4096)
    kernel.liveupdate.outgoing[0].preserve(memory("more"), 9)
    recorder.begin()
    updated(kernel, recorder, (MEMORY,))
    assert len(recorder.calls) == 7


@pytest.mark.parametrize("at", range(3))
def test_an_interrupt_in_retrieve_is_not_remembered(recorder, incoming, at):
    recorder.begin({0: INTERRUPT})
    with pytest.raises(KeyboardInterrupt):
        incoming.retrieve(at)

    assert incoming.files[at].file is None
    assert incoming.retrieve(at).kind == "memory"


@pytest.mark.parametrize("at", range(3))
def test_an_interrupt_before_anything_is_finished_closes_nothing(recorder, incoming, at):
    recorder.begin({at: INTERRUPT})
    with pytest.raises(KeyboardInterrupt):
        incoming.close()

    assert len(incoming.files) == 3
    recorder.begin()
    incoming.close()
    assert incoming.files == ()


@pytest.mark.parametrize("at", range(3, 6))
def test_an_interrupt_in_finish_stops_nothing(recorder, updated_kernel, incoming, at):
    recorder.begin({at: INTERRUPT})
    with pytest.raises(KeyboardInterrupt):
        incoming.close()

    assert [call.event for call in recorder.calls] == ["CAN_FINISH"] * 3 + ["FINISH"] * 3
    assert updated_kernel.liveupdate.incoming == ()
    assert updated_kernel.kho.incoming.nr_unrestored == rig.beside()[1]


def test_a_kexec_from_a_callback_keeps_the_loaded_image(recorder):
    kernel = filled(recorder)
    kernel.kexec_load(rig.kernel(kernel.machine, recorder, (MEMORY,)))
    refused = []
    recorder.begin()
    recorder.hooks[0] = lambda _: refused.append(errno_of(kernel.kexec))
    kernel.liveupdate.outgoing[0].preserve(memory("new"), 1)

    assert refused == [errno.EDEADLK]
    kernel.kexec()


def call_back(kernel, session):
    """Everything that a callback may try."""
    live = kernel.liveupdate
    return (
        lambda: session.preserve(memory("other"), 99),
        lambda: session.retrieve(0),
        session.finish,
        session.close,
        live.freeze,
        kernel.kexec,
    )


@pytest.mark.parametrize("what", range(6))
def test_a_callback_that_calls_back_is_a_deadlock(recorder, what):
    kernel = filled(recorder)
    session = kernel.liveupdate.outgoing[0]
    kernel.kexec_load(rig.kernel(kernel.machine, recorder, (MEMORY,)))
    refused = []
    recorder.begin()
    for number in range(3):
        recorder.hooks[number] = lambda _: refused.append(
            errno_of(call_back(kernel, session)[what])
        )
    session.preserve(memory("new"), 1)

    assert refused == [errno.EDEADLK] * 2  # can_preserve and preserve
    assert len(session.files) == 2


def run_aside(call):
    """Start *call* in a thread; returns join(), which returns its errno or None."""
    outcome = []
    thread = threading.Thread(target=lambda: outcome.append(errno_of(call)), daemon=True)
    thread.start()

    def join(timeout=20.0):
        thread.join(timeout)
        return outcome[0] if outcome else "waits"

    return join


def test_who_comes_while_it_is_frozen_waits_until_the_kernel_is_gone(recorder):
    kernel = filled(recorder)
    session = kernel.liveupdate.outgoing[0]
    node = kernel.liveupdate.open()
    waiting = []

    def start(_):
        waiting.append(run_aside(lambda: session.preserve(memory("late"), 99)))
        waiting.append(run_aside(lambda: node.create_session("late")))
        waiting.append(run_aside(session.close))
        assert [join(0.05) for join in waiting] == ["waits"] * 3

    kernel.on_handover = start
    last = updated(kernel, recorder, (MEMORY,))

    assert [join() for join in waiting] == [errno.ESHUTDOWN, errno.ESHUTDOWN, None]
    with last.liveupdate.open():
        assert [len(each.files) for each in last.liveupdate.incoming] == [1]


def test_who_waits_goes_on_when_the_jump_fails(recorder):
    kernel = damaged(recorder, "compatible")
    session = kernel.liveupdate.outgoing[0]
    damage, waiting = kernel.on_handover, []

    def start(handover):
        damage(handover)
        waiting.append(run_aside(lambda: session.preserve(memory("late"), 99)))
        assert waiting[0](0.05) == "waits"

    kernel.on_handover = start
    with pytest.raises(SuccessorError):
        updated(kernel, recorder, (MEMORY,))

    assert waiting[0]() is None
    assert [file.token for file in session.files] == [0, 99]


def test_a_handler_that_goes_while_it_is_asked_gets_no_file(recorder):
    kernel = booted(recorder)
    with kernel.liveupdate.open() as node:
        session = node.create_session("a")
    recorder.hooks[0] = lambda _: kernel.liveupdate.unregister_handler(recorder.handler(MEMORY))

    assert errno_of(session.preserve, memory(1), 1) == errno.ENOENT
    assert short(recorder) == ["CAN_PRESERVE memory-v1 ?"]


def test_a_handler_stays_while_it_preserves(recorder):
    kernel = booted(recorder)
    with kernel.liveupdate.open() as node:
        session = node.create_session("a")
    unregister = functools.partial(kernel.liveupdate.unregister_handler, recorder.handler(MEMORY))
    refused = []
    recorder.hooks[1] = lambda _: refused.append(errno_of(unregister))
    recorder.faults = {1: -errno.EIO}
    assert errno_of(session.preserve, memory(1), 1) == errno.EIO

    assert refused == [errno.EBUSY]
    unregister()


def test_a_broken_load_pins_nobody(recorder):
    kernel = filled(recorder, sessions=2, files=2)
    at_handover(kernel, lambda head, _: BROKEN["too few files"](kernel, head))
    live = updated(kernel, recorder, (MEMORY,)).liveupdate
    assert errno_of(live.open) == errno.EIO

    live.unregister_handler(recorder.handler(MEMORY))


def test_a_file_may_ask_for_what_it_depends_on(recorder, kernel, outgoing):
    """As a device's retrieve asks for the state of its IOMMU."""
    links = [(VFIO, "iommu"), (VFIO, "pci")]
    outgoing.preserve(vfio(1), 1)
    last = updated(kernel, recorder, (VFIO,), links)
    with last.liveupdate.open() as node:
        session = node.retrieve_session("vm")
    got = []

    def ask(_):
        got.append(last.liveupdate.flb_get_incoming(recorder.flb("iommu")))
        last.liveupdate.flb_put_incoming(recorder.flb("iommu"))

    recorder.begin()
    recorder.hooks[0] = ask
    session.retrieve(1)
    assert got[0][:2] == ("RETRIEVE", "iommu")


@pytest.mark.parametrize("what", range(6))
def test_a_freeze_callback_that_calls_back_is_a_deadlock(recorder, what):
    kernel = filled(recorder)
    session = kernel.liveupdate.outgoing[0]
    refused = []
    recorder.begin()
    recorder.hooks[0] = lambda _: refused.append(errno_of(call_back(kernel, session)[what]))
    updated(kernel, recorder, (MEMORY,))

    assert refused == [errno.EDEADLK]


def test_threads_that_work_while_it_freezes_and_goes_on(recorder):
    """Nobody loses anything, and in the end every page is back."""
    kernel = booted(recorder, (MEMORY, VFIO), [(VFIO, "iommu")])
    live, failures, stop = kernel.liveupdate, [], threading.Event()
    node, pages = live.open(), luo_pages(kernel)

    def work(name):
        try:
            while not stop.is_set():
                session = node.create_session(name)
                for token in range(70):
                    session.preserve(vfio((name, token)), token)
                assert len(session.files) == 70
                session.close()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(f"t{n}",), daemon=True) for n in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        with live.frozen():
            frozen = [(session.name, len(session.files)) for session in live.outgoing]
            time.sleep(0.001)
            assert [(each.name, len(each.files)) for each in live.outgoing] == frozen
    stop.set()
    for thread in threads:
        thread.join(60)

    assert failures == []
    assert live.outgoing == ()
    assert luo_pages(kernel) == pages
    events = [call.event for call in recorder.calls if len(call) == 4]
    assert events.count("PRESERVE") == events.count("UNPRESERVE")


def test_threads_that_work_while_it_jumps(recorder):
    """What was answered with success before the jump has come over, and nothing else."""
    kernel = booted(recorder)
    node, done, stop = kernel.liveupdate.open(), {}, []

    def work(name):
        try:
            session = node.create_session(name)
            done[name] = 0
            for token in range(100_000):
                session.preserve(memory((name, token)), token)
                done[name] = token + 1
        except OSError as error:
            stop.append(error.errno)

    threads = [threading.Thread(target=work, args=(f"t{n}",), daemon=True) for n in range(4)]
    for thread in threads:
        thread.start()
    while len(done) < 4 or min(done.values()) < 20:
        time.sleep(0.001)
    last = updated(kernel, recorder, (MEMORY,))
    for thread in threads:
        thread.join(20)

    assert stop == [errno.ESHUTDOWN] * 4
    with last.liveupdate.open():
        came = {session.name: len(session.files) for session in last.liveupdate.incoming}
    assert came == done
