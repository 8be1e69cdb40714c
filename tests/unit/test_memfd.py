"""The memfd handler: real memfds in, simulated memory between, real memfds out."""

import contextlib
import errno
import fcntl
import gc
import mmap
import os
import struct
import tempfile
from types import SimpleNamespace

import numpy as np
import pytest

from luo import memfd
from luo.errors import HandoverError, KhoError, KhoNoMemoryError
from luo.files import FileArgs, FileHandler
from luo.kho import Kho
from luo.memfd import folio_orders, memfd_handler, read_memfd, write_contents
from luo.memory import PhysicalMemory

PAGE = 4096
SEAL, SHRINK, GROW, WRITE, FUTURE, EXEC = 1, 2, 4, 8, 0x10, 0x20
NOEXEC_SEAL = 0x8  # MFD_NOEXEC_SEAL
SIZES = [0, 1, 4095, 4096, 4097, 5 * PAGE, 511 * PAGE, 512 * PAGE + 1, (2 << 20) + 1]


_open: list[int] = []


@pytest.fixture(autouse=True)
def closing():
    """Close what the test has opened and was given."""
    yield
    while _open:
        os.close(_open.pop())


def pattern(nbytes: int, seed: int = 1) -> bytes:
    """Bytes without a period that a page would hide."""
    return np.random.default_rng(seed).bytes(nbytes)


def new(contents: bytes = b"", flags: int = os.MFD_ALLOW_SEALING) -> int:
    """A memfd with *contents*, at position 0."""
    fd = os.memfd_create("test", flags)
    _open.append(fd)
    os.pwrite(fd, contents, 0)
    return fd


def contents(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size + 1, 0)


def seals(fd: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_GET_SEALS)


def position(fd: int) -> int:
    return os.lseek(fd, 0, os.SEEK_CUR)


def u64(memory: PhysicalMemory, phys: int) -> int:
    return int.from_bytes(memory.view(phys, 8), "little")


def put_u64(memory: PhysicalMemory, phys: int, value: int) -> None:
    memory.view(phys, 8)[:] = value.to_bytes(8, "little")


class Side:
    """One kernel, as much of it as a handler sees."""

    def __init__(self, kho: Kho, max_order: int = 0) -> None:
        self.kho = kho
        self.memory = kho.memory
        self.handler = memfd_handler(max_order)

    def args(self, file: int | None, data: int = 0) -> FileArgs:
        kernel = SimpleNamespace(kho=self.kho, memory=self.memory)
        return FileArgs(kernel, self.handler, "session", 1, file, data)

    def preserve(self, fd: int) -> FileArgs:
        args = self.args(fd)
        self.handler.preserve(args)
        return args

    def jump(self, memory: PhysicalMemory | None = None) -> "Side":
        handover = self.kho.handover()
        self.kho.close()
        return Side(Kho.boot(memory or self.memory, handover))

    def retrieve(self, data: int) -> FileArgs:
        args = self.args(None, data)
        try:
            self.handler.retrieve(args)
        except OSError as error:
            args.retrieve_status = -error.errno
            raise
        args.retrieve_status = 1
        _open.append(args.file)
        return args


def side(size: str | int = "64MiB", max_order: int = 0, **settings) -> Side:
    memory = PhysicalMemory(size, **settings)
    dirty = min(memory.size, 16 << 20)  # no page is zero by chance
    np.frombuffer(memory.view(memory.base, dirty), np.uint8)[:] = 0xA5
    return Side(Kho(memory, scratch=[]), max_order)


def held(one: Side) -> tuple[int, int]:
    """Pages that are free, or the map's own, which stay its own; and keys."""
    return one.memory.nr_free_pages() + one.kho.tree_pages, one.kho.nr_preserved


# ---- bytes ----


def test_bytes_are_those_of_memfd_v2():
    """Record, array, flags and contents stand where the layout says, and each has its key."""
    one = side()
    memory = one.memory
    fd = new(b"A" * PAGE + b"B" * PAGE + b"CCC")
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, GROW | SHRINK)
    os.lseek(fd, 0x1234, os.SEEK_SET)
    before = set(zip(*(column.tolist() for column in one.kho.preserved()), strict=True))
    args = one.preserve(fd)
    raw = bytes(memory.view(args.data, 48))

    assert struct.unpack_from("<QQIIQ", raw) == (0x1234, 2 * PAGE + 3, GROW | SHRINK, 0, 3)
    chunk, total_pages, flags, order = struct.unpack_from("<QIHH", raw, 32)
    assert (1, 1, 0) == (total_pages, flags, order)
    assert args.data % PAGE == 0
    following, array, end = struct.unpack_from("<QQQ", memory.view(chunk, 24))
    assert (0, 0) == (following, end)
    records = struct.unpack_from("<6Q", memory.view(array, PAGE))
    assert [3 << 52] * 3 == [word & ~((1 << 52) - 1) for word in records[::2]]
    assert (0, 1, 2) == records[1::2]
    folios = [(word & ((1 << 52) - 1)) * PAGE for word in records[::2]]
    assert not any(memory.view(array + 48, PAGE - 48))
    assert [b"A" * PAGE, b"B" * PAGE, b"CCC" + bytes(PAGE - 3)] == [
        bytes(memory.view(phys, PAGE)) for phys in folios
    ]
    assert not any(memory.view(args.data + 48, PAGE - 48))
    after = set(zip(*(column.tolist() for column in one.kho.preserved()), strict=True))
    assert {(phys, 0) for phys in (args.data, chunk, array, *folios)} == after - before


def test_empty_file_has_no_array():
    """An empty file is its record alone: no folios, and a descriptor of zeros."""
    one = side()
    before = one.kho.nr_preserved
    args = one.preserve(new())

    assert bytes(48) == bytes(one.memory.view(args.data, 48))[:16] + bytes(32)
    assert (0).to_bytes(24, "little") == bytes(one.memory.view(args.data, 48))[24:]
    assert before + 1 == one.kho.nr_preserved


def test_folios_have_the_largest_orders_that_fit():
    """Of 2 * 512 + 7 pages at most order 9: 9, 9, 2, 1, 0, each at a multiple of its pages."""
    one = side(max_order=9)
    data = pattern((2 * 512 + 7) * PAGE - 11)
    fd = new(data)
    args = one.preserve(fd)
    kept = args.private

    assert [9, 9, 2, 1, 0] == kept.orders.tolist()
    assert all(
        one.kho.is_preserved(int(p), int(o)) for p, o in zip(kept.folios, kept.orders, strict=True)
    )
    two = one.jump()
    back = two.retrieve(args.data).file
    assert data == contents(back)


def test_orders_stop_at_what_memory_has():
    """A handler of order 63 makes folios of the kernel's largest order, and smaller ones."""
    one = side(max_order=63)
    args = one.preserve(new(pattern(9 << 20)))

    assert [10, 10, 8] == args.private.orders.tolist()


def test_fragmented_memory_gives_smaller_folios():
    """Where no block of the largest order is free, all become smaller; nothing is lost."""
    one = side("16MiB", max_order=4)
    pages = one.memory.alloc_folios(one.memory.nr_free_pages(), 0)
    one.memory.free_folios(np.ascontiguousarray(pages[pages // PAGE % 4 != 3]))
    data = pattern(200 * PAGE)
    args = one.preserve(new(data))

    assert {1} == set(args.private.orders.tolist())
    two = one.jump()
    assert data == contents(two.retrieve(args.data).file)


def test_handler_made_anew_from_the_callbacks_works():
    """As when it is given FLBs, or a callback is wrapped; the cost is known to the first."""
    one = side("16MiB")
    first = one.handler
    one.handler = FileHandler(
        first.compatible,
        first.can_preserve,
        first.preserve,
        first.unpreserve,
        first.retrieve,
        first.finish,
        freeze=first.freeze,
    )
    args = one.preserve(new(b"contents"))
    one.handler.freeze(args)

    assert 8 == first.cost.copied_bytes == args.private.cost.copied_bytes
    assert b"contents" == contents(one.jump().retrieve(args.data).file)


def test_negative_order_is_refused():
    """There are no such folios."""
    with pytest.raises(ValueError, match="negative"):
        memfd_handler(-1)


# ---- there and back ----


@pytest.mark.parametrize("max_order", [0, 3, 9])
@pytest.mark.parametrize("nbytes", SIZES)
def test_file_comes_back(nbytes, max_order):
    """Contents, size, position and seals; and every page is free again."""
    one = side(max_order=max_order)
    data = pattern(nbytes)
    fd = new(data)
    os.lseek(fd, nbytes // 2, os.SEEK_SET)
    args = one.preserve(fd)
    one.handler.freeze(args)
    two = one.jump()
    free = two.memory.nr_free_pages()
    preserved = two.kho.incoming.nr_unrestored
    back = two.retrieve(args.data).file

    assert data == contents(back)
    assert nbytes // 2 == position(back)
    assert 0 == seals(back)
    assert not os.get_inheritable(back)
    assert os.readlink(f"/proc/self/fd/{back}") == "/memfd: (deleted)"
    assert nbytes == two.handler.cost.retrieved_bytes
    pages = -(-nbytes // PAGE)
    folios = len(args.private.folios)
    array = -(-folios * 16 // PAGE)
    chunks = array // 511 + 1 if nbytes else 0
    assert free + pages + array + chunks + 1 == two.memory.nr_free_pages()
    assert preserved - folios - array - chunks - 1 == two.kho.incoming.nr_unrestored


@pytest.mark.parametrize("page", ["16KiB", "64KiB"])
def test_other_pages_than_the_hosts(page):
    """Index and pfn count pages of the simulated machine, not of this one."""
    one = side("128MiB", page_size=page)
    data = pattern(5 * one.memory.page_size + 4097)
    args = one.preserve(new(data))

    assert 6 == len(args.private.folios)
    assert data == contents(one.jump().retrieve(args.data).file)


@pytest.mark.parametrize("settings", [{"base": 1 << 30}, {"base": 0x40000000, "nodes": 2}])
def test_memory_that_the_host_does_not_have_yet(settings):
    """What is not resident is written to the file of memory, at the right place."""
    one = Side(Kho(PhysicalMemory("256MiB", **settings), scratch=[]), 9)
    data = pattern((40 << 20) + 5)
    fd = new(data)
    args = one.preserve(fd)
    kept = args.private
    found = b"".join(
        bytes(one.memory.view(int(phys), PAGE << int(order)))
        for phys, order in zip(kept.folios, kept.orders, strict=True)
    )

    assert data == found[: len(data)]
    assert not any(found[len(data) :])
    assert data == contents(one.jump().retrieve(args.data).file)


def test_memory_without_a_file():
    """A buffer of the host is memory as well."""
    memory = PhysicalMemory("32MiB", host=mmap.mmap(-1, 32 << 20))
    one = Side(Kho(memory, scratch=[]))
    data = pattern(3 * PAGE + 1)
    fd = new(data)
    args = one.preserve(fd)
    os.pwrite(fd, b"later", PAGE)
    one.handler.freeze(args)

    assert contents(fd) == contents(one.jump().retrieve(args.data).file)


def test_memory_in_scattered_pages():
    """No two pages of the file adjoin in memory; neither do those of the array."""
    one = side("32MiB")
    pages = one.memory.alloc_folios(one.memory.nr_free_pages(), 0)
    one.memory.free_folios(np.ascontiguousarray(pages[::2]))
    data = pattern(700 * PAGE + 9)
    fd = new(data)
    args = one.preserve(fd)
    os.pwrite(fd, b"x" * 3 * PAGE, 300 * PAGE - 5)
    one.handler.freeze(args)

    assert 4 * PAGE == args.private.cost.recopied_bytes
    assert (np.diff(args.private.folios.astype(np.int64)) != PAGE).all()
    assert contents(fd) == contents(one.jump().retrieve(args.data).file)


def test_untouched_memory_is_not_touched_by_holes():
    """A sparse file takes no memory of the host, neither here nor when it comes back."""
    memory = PhysicalMemory("1GiB")
    one = Side(Kho(memory, scratch=[]), 9)
    fd = new()
    os.ftruncate(fd, 512 << 20)
    os.pwrite(fd, b"middle", 256 << 20)
    held = os.fstat(memory.fd).st_blocks
    args = one.preserve(fd)
    one.handler.freeze(args)
    two = one.jump()
    back = two.retrieve(args.data).file

    assert 4 << 20 > 512 * (os.fstat(memory.fd).st_blocks - held)
    assert 8 == os.fstat(fd).st_blocks
    assert 8 == os.fstat(back).st_blocks
    assert b"\0middle\0" == os.pread(back, 8, (256 << 20) - 1)
    assert 512 << 20 == os.fstat(back).st_size
    assert PAGE == two.handler.cost.retrieved_bytes == one.handler.cost.copied_bytes


def test_holes_are_zeros_in_dirty_memory():
    """Whatever the folios held before, holes and the rest of the last page are zeros in them."""
    one = side()
    fd = new()
    os.ftruncate(fd, 40 * PAGE + 100)
    os.pwrite(fd, b"a" * PAGE, 7 * PAGE)
    args = one.preserve(fd)
    expected = bytearray(41 * PAGE)
    expected[7 * PAGE : 8 * PAGE] = b"a" * PAGE
    found = b"".join(bytes(one.memory.view(int(p), PAGE)) for p in args.private.folios)

    assert expected == found
    assert contents(fd) == contents(one.jump().retrieve(args.data).file)


@pytest.mark.parametrize("chosen", range(64))
def test_all_seals_come_back(chosen):
    """Each combination of the six seals; F_SEAL_EXEC of an executable file implies 0x1e."""
    fd = new(b"sealed", os.MFD_ALLOW_SEALING)
    os.lseek(fd, 3, os.SEEK_SET)
    try:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, chosen)
    except OSError:
        pytest.skip("this host has no such seal")
    one = side("16MiB")
    args = one.preserve(fd)
    one.handler.freeze(args)
    back = one.jump().retrieve(args.data).file

    assert seals(fd) == seals(back) == chosen | (0x1E if chosen & EXEC else 0)
    assert b"sealed" == contents(back)
    assert 3 == position(back)


def test_file_that_was_never_executable_comes_back_sealed_more():
    """As with Linux: only F_SEAL_EXEC before, 0x3e after."""
    try:
        fd = new(b"x", NOEXEC_SEAL)
    except OSError:
        pytest.skip("this host has no MFD_NOEXEC_SEAL")
    one = side("16MiB")
    args = one.preserve(fd)

    assert EXEC == seals(fd)
    assert 0x3E == seals(one.jump().retrieve(args.data).file)


@pytest.mark.parametrize("pos", [0, 5, 6, 1 << 40, (1 << 63) - 1])
def test_position_is_that_of_the_jump(pos):
    """It may lie behind the end, and may move after PRESERVE."""
    one = side("16MiB")
    fd = new(b"123456")
    args = one.preserve(fd)
    os.lseek(fd, pos, os.SEEK_SET)
    one.handler.freeze(args)

    assert pos == position(fd)
    assert pos == position(one.jump().retrieve(args.data).file)


# ---- what changes after PRESERVE ----


def fill_hole(fd: int) -> None:
    os.pwrite(fd, b"new", 500 * PAGE + 17)


def write_mapped(fd: int) -> None:
    with mmap.mmap(fd, 0) as mapped:
        mapped[3 * PAGE + 9] ^= 0xFF
        mapped[-1] ^= 0xFF


def punch(fd: int) -> None:
    """Make a hole of two pages, as FALLOC_FL_PUNCH_HOLE does."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    rc = libc.fallocate(fd, 3, ctypes.c_long(2 * PAGE), ctypes.c_long(2 * PAGE))
    if rc:
        raise OSError(ctypes.get_errno(), "fallocate")


def same_again(fd: int) -> None:
    os.pwrite(fd, os.pread(fd, 9 * PAGE, 0), 0)


def everything(fd: int) -> None:
    os.pwrite(fd, pattern(os.fstat(fd).st_size, 2), 0)


def twice(fd: int) -> None:
    os.ftruncate(fd, 0)
    os.ftruncate(fd, 700 * PAGE + 123)


@pytest.mark.parametrize(
    ("change", "grains"),
    [
        (fill_hole, 1),
        (write_mapped, 2),
        (punch, 2),
        (same_again, 0),
        (everything, 701),
        (twice, None),
    ],
)
def test_what_was_written_after_preserve_arrives(change, grains):
    """In-place writes are allowed until the jump; of what was compared, only that is recopied."""
    one = side()
    fd = new(pattern(400 * PAGE))
    os.ftruncate(fd, 700 * PAGE + 123)  # ends in a hole
    args = one.preserve(fd)
    change(fd)
    one.handler.freeze(args)
    cost = args.private.cost

    assert 700 * PAGE + 123 == cost.compared_bytes
    if grains is not None:
        assert grains * PAGE == cost.recopied_bytes
    assert cost.freeze_ns > 0
    assert cost == one.handler.cost
    two = one.jump()
    assert contents(fd) == contents(two.retrieve(args.data).file)


def test_frozen_twice_is_recopied_twice():
    """A jump that failed, more writes, another jump: the last state arrives."""
    one = side()
    fd = new(pattern(3 * PAGE))
    args = one.preserve(fd)
    for text in (b"one", b"two"):
        os.pwrite(fd, text, PAGE)
        one.handler.freeze(args)

    assert 2 * PAGE == args.private.cost.recopied_bytes
    assert 6 * PAGE == args.private.cost.compared_bytes
    assert contents(fd) == contents(one.jump().retrieve(args.data).file)


@pytest.mark.parametrize("sealed", [WRITE | SHRINK, WRITE | SHRINK | GROW | SEAL])
def test_file_that_cannot_change_is_not_compared(sealed):
    """Sealed against writing and shrinking: the jump costs nothing."""
    one = side()
    fd = new(pattern(3 * PAGE))
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, sealed)
    args = one.preserve(fd)
    os.lseek(fd, 9, os.SEEK_SET)
    one.handler.freeze(args)
    back = one.jump().retrieve(args.data).file

    assert 0 == args.private.cost.compared_bytes
    assert contents(fd) == contents(back)
    assert 9 == position(back)


def test_file_that_may_shrink_is_compared():
    """Sealed against writing alone it can still be cut and grow again, and lose what it held."""
    one = side()
    fd = new(pattern(3 * PAGE))
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, WRITE)
    args = one.preserve(fd)
    os.ftruncate(fd, 0)
    os.ftruncate(fd, 3 * PAGE)
    one.handler.freeze(args)

    assert bytes(3 * PAGE) == contents(one.jump().retrieve(args.data).file)


@pytest.mark.parametrize("nbytes", [0, 1, 3 * PAGE - 1, 3 * PAGE + 1, 1 << 30])
def test_resized_file_is_eperm(nbytes):
    """The jump fails; when the size is back, it does not."""
    one = side()
    fd = new(pattern(3 * PAGE))
    args = one.preserve(fd)
    os.ftruncate(fd, nbytes)
    with pytest.raises(KhoError) as refused:
        one.handler.freeze(args)

    assert errno.EPERM == refused.value.errno
    os.ftruncate(fd, 3 * PAGE)
    one.handler.freeze(args)
    assert contents(fd) == contents(one.jump().retrieve(args.data).file)


# ---- what it takes ----


def test_only_files_of_tmpfs_without_a_name_are_taken(tmp_path):
    """A real memfd; and, as in Linux, any unlinked file of tmpfs. Not hugetlbfs, not the rest."""
    can_preserve = memfd_handler().can_preserve
    pipe = os.pipe()
    regular = os.open(tmp_path / "regular", os.O_CREAT | os.O_RDWR)
    others = [*pipe, regular, os.open("/dev/null", os.O_RDWR)]
    with contextlib.suppress(OSError):  # a host without huge pages
        others.append(os.memfd_create("huge", os.MFD_HUGETLB | os.MFD_ALLOW_SEALING))
    _open.extend(others[1:])

    assert can_preserve(new())
    assert can_preserve(new(flags=0))
    assert not any(map(can_preserve, others))
    assert not can_preserve("file")
    assert not can_preserve(None)
    os.close(pipe[0])
    with pytest.raises(OSError, match="Bad file") as closed:
        can_preserve(pipe[0])
    assert errno.EBADF == closed.value.errno


def test_unlinked_file_of_another_tmpfs():
    """It is no memfd, but becomes one; the mount is not memory's."""
    try:
        fd, name = tempfile.mkstemp(dir="/dev/shm")
    except OSError:
        pytest.skip("no /dev/shm")
    _open.append(fd)
    data = pattern(20 * PAGE)
    os.pwrite(fd, data, 0)
    handler = memfd_handler()
    named = handler.can_preserve(fd)
    os.unlink(name)
    if os.fstatvfs(fd).f_bsize != PAGE or not _is_tmpfs(fd):
        pytest.skip("/dev/shm is no tmpfs")
    assert not named
    assert handler.can_preserve(fd)
    one = Side(Kho(PhysicalMemory("64MiB")))  # whose pages the host does not have yet
    args = one.preserve(fd)
    back = one.jump().retrieve(args.data).file

    assert data == contents(back)
    assert SEAL == seals(back)


def _is_tmpfs(fd: int) -> bool:
    try:
        seals(fd)
    except OSError:
        return False
    return True


def test_file_that_cannot_be_opened_again_is_read_all_the_same(monkeypatch):
    """Without /proc holes are not seen; contents and position are right."""
    one = side()
    fd = new(b"start")
    os.ftruncate(fd, 20 * PAGE)
    os.lseek(fd, 3, os.SEEK_SET)

    def refuse(*args):
        raise OSError(errno.ENOENT, "no /proc")

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", refuse)
        args = one.preserve(fd)
        os.pwrite(fd, b"more", 9 * PAGE)
        one.handler.freeze(args)

    assert 20 * PAGE == args.private.cost.copied_bytes
    assert 3 == position(fd)
    back = one.jump().retrieve(args.data).file
    assert contents(fd) == contents(back)
    assert 3 == position(back)


def test_file_open_for_writing_only_is_read_all_the_same():
    """A reference to the file is enough, as in Linux."""
    one = side()
    fd = new(b"contents")
    writer = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY)
    _open.append(writer)
    args = one.preserve(writer)

    assert b"contents" == contents(one.jump().retrieve(args.data).file)


def test_huge_file_is_efbig():
    """2^32 pages are too many, one page less would be too much for this machine."""
    one = side("16MiB")
    before = held(one)
    fd = new()
    for nbytes, code in ((1 << 44, errno.EFBIG), ((1 << 44) - PAGE, errno.ENOMEM)):
        os.ftruncate(fd, nbytes)
        with pytest.raises(KhoError) as refused:
            one.preserve(fd)
        assert code == refused.value.errno
    assert before == held(one)


def test_unknown_seal_is_eopnotsupp(monkeypatch):
    """Seals of a later kernel are none of memfd-v2."""
    one = side()
    before = held(one)
    fd = new(b"x")
    monkeypatch.setattr(memfd.fcntl, "fcntl", lambda *args: 0x41)
    with pytest.raises(KhoError) as refused:
        one.preserve(fd)

    assert errno.EOPNOTSUPP == refused.value.errno
    assert before == held(one)


@pytest.mark.parametrize("max_order", [0, 5])
def test_preserve_without_memory_leaves_nothing(max_order):
    """Whatever allocation fails, pages and keys are as before."""
    one = side("16MiB", max_order)
    fd = new(pattern(300 * PAGE))
    one.handler.unpreserve(one.preserve(fd))  # so that the map has the pages that it needs
    hog = one.memory.alloc_folios(one.memory.nr_free_pages(), 0)
    before = held(one)
    failed = 0
    for spare in range(len(hog)):
        released = np.ascontiguousarray(hog[len(hog) - spare :])
        one.memory.free_folios(released)
        try:
            args = one.preserve(fd)
        except KhoNoMemoryError:
            failed += 1
            for phys in released.tolist():
                one.memory.claim(phys, 0)
            assert before == held(one)
            continue
        break
    one.handler.unpreserve(args)

    needed = 300 + 1 + 2 + 1 if max_order == 0 else 300 + 1 + 1 + 1
    assert needed == failed  # folios, record, array, chunk: one page less fails


@pytest.mark.parametrize("nbytes", SIZES)
def test_unpreserve_leaves_nothing(nbytes):
    """Free pages and keys are as before; the file is untouched."""
    one = side(max_order=2)
    before = held(one)
    fd = new(pattern(nbytes))
    os.lseek(fd, 1, os.SEEK_SET)
    args = one.preserve(fd)
    one.handler.freeze(args)
    one.handler.unpreserve(args)

    assert before == held(one)
    assert pattern(nbytes) == contents(fd)
    assert 1 == position(fd)


@pytest.mark.parametrize("nbytes", SIZES)
def test_finish_of_what_nobody_retrieved_leaves_nothing(nbytes):
    """Folios, array, chunks and record are free again."""
    one = side(max_order=2)
    idle = one.kho.nr_preserved
    args = one.preserve(new(pattern(nbytes)))
    two = one.jump()
    free = two.memory.nr_free_pages()
    held = two.kho.incoming.preserved_pages
    late = two.args(None, args.data)
    two.handler.finish(late)

    assert idle == two.kho.incoming.nr_unrestored
    assert held - idle == two.memory.nr_free_pages() - free


def test_finish_after_retrieve_does_nothing():
    """Retrieving has freed everything already."""
    one = side()
    args = one.preserve(new(b"x"))
    two = one.jump()
    got = two.retrieve(args.data)
    state = two.memory.nr_free_pages(), two.kho.incoming.nr_unrestored
    two.handler.finish(got)

    assert state == (two.memory.nr_free_pages(), two.kho.incoming.nr_unrestored)
    assert b"x" == contents(got.file)


# ---- wrong bytes ----


def hostile(nr_pages: int = 5, max_order: int = 0) -> tuple[Side, FileArgs, int, int]:
    """A preserved file, the addresses of its chunk and of the page of its array."""
    one = side("16MiB", max_order)
    args = one.preserve(new(pattern(nr_pages * PAGE)))
    chunk = u64(one.memory, args.data + 32)
    return one, args, chunk, u64(one.memory, chunk + 8)


def set_at(what: str, offset: int, value: int):
    """A change of one word of the record, the chunk or the array."""

    def change(memory: PhysicalMemory, record: int, chunk: int, array: int) -> None:
        base = {"record": record, "chunk": chunk, "array": array}[what]
        put_u64(memory, base + offset, value)

    change.__name__ = f"{what}+{offset}={value:#x}"
    return change


def folio_is(of: str):
    """A folio that is said to lie where something else does."""

    def change(memory: PhysicalMemory, record: int, chunk: int, array: int) -> None:
        phys = {"record": record, "chunk": chunk, "array": array}[of]
        put_u64(memory, array, 3 << 52 | phys // PAGE)

    change.__name__ = f"folio is {of}"
    return change


def array_is_record(memory: PhysicalMemory, record: int, chunk: int, array: int) -> None:
    put_u64(memory, chunk + 8, record)


def chunk_is_record(memory: PhysicalMemory, record: int, chunk: int, array: int) -> None:
    put_u64(memory, record + 32, record)


def same_folio(memory: PhysicalMemory, record: int, chunk: int, array: int) -> None:
    put_u64(memory, array + 16, u64(memory, array))


def same_index(memory: PhysicalMemory, record: int, chunk: int, array: int) -> None:
    put_u64(memory, array + 24, 0)


#: What is changed, the errno, and the pages that cannot be freed: nobody can tell whose they are.
WRONG = [
    (set_at("record", 16, 0x40), errno.EOPNOTSUPP, 0),
    (set_at("record", 16, 1 << 32), errno.EINVAL, 0),  # flags
    (set_at("record", 8, 1 << 63), errno.EINVAL, 0),
    (set_at("record", 24, 257), errno.EINVAL, 7),  # folios
    (set_at("record", 24, 1 << 60), errno.EINVAL, 7),
    (set_at("record", 24, (1 << 64) - 1), errno.EINVAL, 7),
    (set_at("record", 32, 0), errno.EINVAL, 7),  # first chunk
    (set_at("record", 32, 0x123), errno.EINVAL, 7),
    (set_at("record", 32, 1 << 50), errno.EINVAL, 7),
    (set_at("record", 32, PAGE), errno.EINVAL, 7),  # not preserved
    (set_at("record", 40, 2), errno.EINVAL, 7),  # pages of the array
    (set_at("record", 40, 0), errno.EINVAL, 7),
    (set_at("record", 40, 0xFFFFFFFF), errno.EINVAL, 7),
    (set_at("record", 40, 1 | 9 << 48), errno.EINVAL, 7),  # order of its blocks
    (set_at("chunk", 8, 0), errno.EINVAL, 7),
    (set_at("chunk", 8, PAGE), errno.EINVAL, 7),
    (set_at("chunk", 0, PAGE), errno.EINVAL, 7),  # the next one
    (set_at("array", 0, 3 << 52 | 1), errno.EIO, 1),  # pfn 1 is free
    (set_at("array", 0, 3 << 52 | 1 << 40), errno.EIO, 1),
    (set_at("array", 0, (1 << 64) - 1), errno.EIO, 1),
    (folio_is("record"), errno.EIO, 1),
    (folio_is("chunk"), errno.EIO, 1),
    (folio_is("array"), errno.EIO, 1),
    (array_is_record, errno.EIO, None),  # whose words name no folios
    (chunk_is_record, errno.EINVAL, 7),
    (same_folio, errno.EIO, 1),
    (same_index, errno.EEXIST, 0),
]


@pytest.mark.parametrize("asked", ["retrieve", "finish"])
@pytest.mark.parametrize(
    ("change", "code", "lost"), WRONG, ids=lambda value: getattr(value, "__name__", None)
)
def test_wrong_bytes_are_refused_and_freed(change, code, lost, asked):
    """The errno is Linux's; what can be told to be the file's is freed, by one or the other."""
    one, args, chunk, array = hostile()
    idle = one.kho.nr_preserved - 8
    change(one.memory, args.data, chunk, array)
    two = one.jump()
    gc.collect()
    fds = len(os.listdir("/proc/self/fd"))
    late = two.args(None, args.data)
    if asked == "retrieve":
        with pytest.raises(OSError, match="memfd") as refused:
            two.retrieve(args.data)
        assert code == refused.value.errno
        late.retrieve_status = -code
    two.handler.finish(late)

    assert fds >= len(os.listdir("/proc/self/fd"))
    if lost is not None:
        assert idle + lost == two.kho.incoming.nr_unrestored


@pytest.mark.parametrize("data", [0, 1, 8, PAGE, (1 << 64) - 1, (1 << 64) - PAGE, 1 << 40])
def test_record_that_is_none_is_einval(data):
    """A number that leads nowhere frees nothing and breaks nothing."""
    one, args, _, _ = hostile()
    two = one.jump()
    state = two.memory.nr_free_pages(), two.kho.incoming.nr_unrestored
    with pytest.raises(OSError, match="memfd") as refused:
        two.retrieve(data)
    two.handler.finish(two.args(None, data))
    with pytest.raises(OSError, match="memfd"):
        two.retrieve(args.data + 8)

    assert errno.EINVAL == refused.value.errno
    assert state == (two.memory.nr_free_pages(), two.kho.incoming.nr_unrestored)
    assert pattern(5 * PAGE) == contents(two.retrieve(args.data).file)
    with pytest.raises(OSError, match="memfd"):
        two.retrieve(args.data)


def test_folios_that_are_not_preserved_are_counted(caplog):
    """One line in the log, however many there are."""
    one, args, _, array = hostile()
    for word in (0, 16, 32):
        put_u64(one.memory, array + word, 3 << 52 | 1 << 40)
    two = one.jump()
    two.handler.finish(two.args(None, args.data))

    assert ["3 of a memfd's 5 folios are not preserved"] == caplog.messages


def test_misaligned_index_is_einval():
    """A folio of 4 pages begins at a multiple of 4 pages."""
    one, args, _, array = hostile(8, 2)
    put_u64(one.memory, array + 24, 6)
    two = one.jump()
    with pytest.raises(KhoError) as refused:
        two.retrieve(args.data)

    assert errno.EINVAL == refused.value.errno


def test_overlapping_folios_are_eexist():
    """Pages 4 to 7 of the file cannot be in two folios."""
    one, args, _, array = hostile(8, 2)
    put_u64(one.memory, array + 24, 0)
    with pytest.raises(KhoError) as refused:
        one.jump().retrieve(args.data)

    assert errno.EEXIST == refused.value.errno


def test_record_of_another_memory_page_that_was_never_written_is_einval():
    """Reading a hole would fill it, and says nothing."""
    memory = PhysicalMemory("16MiB")
    one = Side(Kho(memory, scratch=[]))
    phys = memory.alloc_folio(0)
    one.kho.preserve_folio(phys, 0)
    two = one.jump()
    with pytest.raises(OSError, match="never written") as refused:
        two.retrieve(phys)

    assert errno.EINVAL == refused.value.errno


def test_array_that_was_never_written_is_einval():
    """A hole in memory says nothing of folios."""
    memory = PhysicalMemory("16MiB")
    one = Side(Kho(memory, scratch=[]))
    args = one.preserve(new(b"x"))
    blank = memory.alloc_folios(1, 0)
    memory.view(args.data + 32, 16)[:] = one.kho.preserve_vmalloc(blank)
    with pytest.raises(KhoError, match="never written") as refused:
        one.jump().retrieve(args.data)

    assert errno.EINVAL == refused.value.errno


def test_pfn_beyond_all_addresses_is_einval():
    """52 bits of pages of 64 KiB are more than 64 bits of address."""
    one = side("64MiB", page_size="64KiB")
    args = one.preserve(new(b"x"))
    array = u64(one.memory, u64(one.memory, args.data + 32) + 8)
    put_u64(one.memory, array, u64(one.memory, array) | 1 << 51)
    with pytest.raises(KhoError, match="pfn") as refused:
        one.jump().retrieve(args.data)

    assert errno.EINVAL == refused.value.errno


def test_file_that_is_cut_while_it_is_read_is_eperm(monkeypatch):
    """Between its size and its bytes somebody was faster."""
    one = side()
    args = one.preserve(new(pattern(3 * PAGE)))
    monkeypatch.setattr(os, "preadv", lambda *args: 0)
    with pytest.raises(KhoError) as refused:
        one.handler.freeze(args)

    assert errno.EPERM == refused.value.errno


def test_host_that_has_only_executable_memfds(monkeypatch):
    """A kernel before 6.3 knows no MFD_EXEC, and makes what that means."""
    one = side("16MiB")
    args = one.preserve(new(b"old host"))
    create = os.memfd_create

    def old(name, flags):
        if flags & 0x10:
            raise OSError(errno.EINVAL, "unknown flag")
        return create(name, flags)

    monkeypatch.setattr(os, "memfd_create", old)

    assert b"old host" == contents(one.jump().retrieve(args.data).file)


# ---- what Linux takes, too ----


def test_holes_in_the_list_are_zeros():
    """An entry with pfn 0, an index that none has, a folio that is not up to date."""
    one, args, _, array = hostile()
    memory = one.memory
    put_u64(memory, array, 0)
    put_u64(memory, array + 16, u64(memory, array + 16) & ~(2 << 52))
    put_u64(memory, array + 24, 1)
    put_u64(memory, array + 40, 7)
    put_u64(memory, args.data + 8, 8 * PAGE + 1)
    data = pattern(5 * PAGE)
    two = one.jump()
    got = two.retrieve(args.data)

    assert contents(got.file) == b"".join(
        (bytes(3 * PAGE), data[3 * PAGE :], bytes(2 * PAGE), data[2 * PAGE : 3 * PAGE], b"\0")
    )
    assert 4 == two.kho.incoming.nr_unrestored + 1  # root tree, metadata, and the folio left out


def test_list_in_any_order():
    """The index says where a folio belongs, not its place in the list."""
    one, args, _, array = hostile()
    view = np.frombuffer(one.memory.view(array, 5 * 16), np.uint64).reshape(5, 2)
    view[:] = view[::-1].copy()

    assert pattern(5 * PAGE) == contents(one.jump().retrieve(args.data).file)


def test_folios_past_the_end_are_not_seen():
    """A folio may reach over the end of the file, or lie behind it; so it was cut."""
    one, args, _, array = hostile()
    put_u64(one.memory, args.data + 8, PAGE + 100)
    put_u64(one.memory, array + 72, (1 << 64) - 1)
    two = one.jump()
    back = two.retrieve(args.data).file
    os.ftruncate(back, 5 * PAGE)

    assert pattern(5 * PAGE)[: PAGE + 100] + bytes(4 * PAGE - 100) == contents(back)


def test_file_of_holes_alone():
    """Size without folios, as of a kernel that left holes out."""
    one = side("16MiB")
    args = one.preserve(new())
    put_u64(one.memory, args.data + 8, 1 << 40)
    back = one.jump().retrieve(args.data).file

    assert 1 << 40 == os.fstat(back).st_size
    assert 0 == os.fstat(back).st_blocks


@pytest.mark.parametrize("pos", [1 << 63, (1 << 64) - 1])
def test_negative_position_is_left_out(pos):
    """As in Linux, whose vfs_setpos() refuses it, and nobody looks."""
    one = side("16MiB")
    args = one.preserve(new(b"x"))
    put_u64(one.memory, args.data, pos)

    assert 0 == position(one.jump().retrieve(args.data).file)


def test_array_of_huge_blocks():
    """A vmalloc area may be of larger blocks than pages."""
    one, args, _, array = hostile()
    memory, kho = one.memory, one.kho
    block = memory.alloc_folio(4)
    memory.view(block, PAGE)[:] = memory.view(array, PAGE)
    memory.view(args.data + 32, 16)[:] = kho.preserve_vmalloc(np.array([block], np.uint64), 4)
    two = one.jump()
    free = two.memory.nr_free_pages()

    assert pattern(5 * PAGE) == contents(two.retrieve(args.data).file)
    assert free + 5 + 16 + 1 + 1 == two.memory.nr_free_pages()


# ---- reading without taking over ----


def test_record_is_read_before_the_commit_point():
    """Memory is attached read-only, the old kernel still runs; nothing is written."""
    one = side(max_order=3)
    data = pattern(21 * PAGE + 5)
    fd = new(data)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, GROW)
    args = one.preserve(fd)
    other = PhysicalMemory.attach(one.memory.fd, one.memory.ranges)
    incoming = Kho.validate(other, one.kho.handover())
    record = read_memfd(incoming, args.data)
    orders = folio_orders(incoming, record)
    out = new()

    assert (0, len(data), GROW) == (record.pos, record.size, record.seals)
    assert [3, 3, 2, 1] == orders.tolist()
    assert [0, 8, 16, 20] == record.index.tolist()
    assert record.filled.all()
    assert len(data) == write_contents(other, record, orders, out)
    assert data == contents(out)
    one.handler.unpreserve(args)  # it was not told


def test_reading_wrong_bytes_says_which():
    """A reader gets the address and the rule; a folio without its key is for the orders to say."""
    one, args, _, array = hostile()
    put_u64(one.memory, array, 3 << 52 | 1)
    two = one.jump()
    record = read_memfd(two.kho.incoming, args.data)
    with pytest.raises(KhoError) as refused:
        folio_orders(two.kho.incoming, record)
    assert errno.EIO == refused.value.errno
    put_u64(one.memory, args.data + 24, 1 << 40)
    with pytest.raises(HandoverError) as wrong:
        read_memfd(two.kho.incoming, args.data)
    assert args.data == wrong.value.phys


def test_host_without_descriptors_fails_retrieve_and_frees_all(monkeypatch):
    """EMFILE, and the file is lost, as in Linux; no page is."""
    one, args, _, _ = hostile()
    idle = one.kho.nr_preserved - 8
    two = one.jump()
    free = two.memory.nr_free_pages()

    def refuse(*args):
        raise OSError(errno.EMFILE, "too many")

    monkeypatch.setattr(os, "memfd_create", refuse)
    with pytest.raises(OSError, match="too many"):
        two.retrieve(args.data)
    assert free + 8 == two.memory.nr_free_pages()
    assert idle == two.kho.incoming.nr_unrestored


def test_retrieve_that_cannot_write_closes_its_file(monkeypatch):
    """A host that is out of memory: the errno is its own, and nothing is left open."""
    one, args, _, _ = hostile()
    two = one.jump()
    gc.collect()
    fds = len(os.listdir("/proc/self/fd"))
    free = two.memory.nr_free_pages()

    def refuse(*args):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "pwritev", refuse)
    with pytest.raises(OSError, match="full"):
        two.retrieve(args.data)
    assert fds >= len(os.listdir("/proc/self/fd"))
    assert free + 8 == two.memory.nr_free_pages()
