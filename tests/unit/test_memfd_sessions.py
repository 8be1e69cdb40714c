"""Memfds in sessions, through whole kernels: preserve, kexec, retrieve, finish."""

import contextlib
import errno
import fcntl
import json
import os

import memfd_kernels
import pytest
from memfd_kernels import told

from luo.errors import CallbackError, KhoError
from luo.image import Image
from luo.kernel import KernelImage
from luo.machine import DeviceTree, Machine

PAGE = 4096


def pattern(nbytes):
    return bytes(range(256)) * (nbytes // 256) + b"x" * (nbytes % 256)


@pytest.fixture
def new():
    """Makes memfds, which the end of the test closes."""
    with contextlib.ExitStack() as stack:

        def make(contents=b"", seals=0):
            fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
            stack.callback(os.close, fd)
            os.pwrite(fd, contents, 0)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
            return fd

        yield make


@pytest.fixture
def kernel():
    return memfd_kernels.plain(memfd_kernels.machine()).boot()


def files_of(kernel, name):
    """Retrieve a session: what there is to know of each file, and the session."""
    with kernel.liveupdate.open() as node:
        session = node.retrieve_session(name)
    found = {}
    for file in session.files:
        fd = session.retrieve(file.token)
        found[file.token] = told(fd)
        os.close(fd)
    return found, session


def successor(kernel, max_order=0):
    kernel.kexec_load(memfd_kernels.plain(kernel.machine, max_order))
    return kernel.kexec()


def various(new):
    """Files of each kind, by token."""
    sparse = new()
    os.ftruncate(sparse, 3 << 20)
    os.pwrite(sparse, b"middle", 1 << 20)
    files = {
        number: new(pattern(size))
        for number, size in enumerate([0, 1, 4095, 4096, 4097, (2 << 20) + 1])
    }
    files |= {
        100: sparse,
        101: new(pattern(5000), fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW),
        102: new(pattern(100), fcntl.F_SEAL_SEAL),
    }
    os.lseek(files[4], 1 << 33, os.SEEK_SET)
    return files


def preserve(kernel, name, files):
    with kernel.liveupdate.open() as node:
        session = node.create_session(name)
    for token, fd in files.items():
        session.preserve(fd, token)
    return session


def test_files_come_back_after_kexec(kernel, new):
    """Whatever the size; what was written in place since, too; finish leaves no page behind."""
    files = various(new)
    session = preserve(kernel, "all", files)
    os.pwrite(files[5], b"later", 1 << 20)
    os.lseek(files[2], 77, os.SEEK_SET)
    expected = {token: told(fd) for token, fd in files.items()}
    entry = session.files[5]
    after = successor(kernel)
    found, session = files_of(after, "all")

    assert expected == found
    assert PAGE == entry.args.private.cost.recopied_bytes
    session.finish()
    session.close()
    assert after.liveupdate.problems == ()
    assert 2 == after.kho.incoming.nr_unrestored  # root tree, kexec-metadata


def test_chain_of_three_kernels(kernel, new):
    """What came over is kept again, three times, in folios of other orders."""
    files = various(new)
    expected = {token: told(fd) for token, fd in files.items()}
    preserve(kernel, "chain", files)
    held = []
    for number in range(3):
        kernel = successor(kernel, max_order=3 * number)
        with kernel.liveupdate.open() as node:
            session = node.retrieve_session("chain")
        files = {file.token: session.retrieve(file.token) for file in session.files}
        held += files.values()
        assert expected == {token: told(fd) for token, fd in files.items()}
        session.close()
        preserve(kernel, "chain", files)

    assert 3 == kernel.liveupdate.liveupdate_num
    for fd in held:
        os.close(fd)


def test_second_process_gives_the_files_back(kernel, new, tmp_path):
    """Nothing but memory goes over; a third process gets from the second what it had."""
    files = various(new)
    expected = {str(token): told(fd) for token, fd in files.items()}
    preserve(kernel, "far", files)
    pids = {os.getpid()}
    for number in range(2):
        out = tmp_path / f"{number}.json"
        kernel.kexec_load(
            KernelImage("memfd_kernels:retrieving", args={"out": str(out), "name": "far"})
        )
        kernel = kernel.kexec()
        said = json.loads(out.read_text())
        pids.add(said["pid"])
        assert expected == said["files"]
    kernel.close()

    assert 3 == len(pids)


def test_file_that_grew_makes_kexec_fail(kernel, new):
    """EPERM, and the old kernel goes on with all that it had; cut again, the jump works."""
    first, second = new(pattern(3 * PAGE)), new(pattern(PAGE))
    session = preserve(kernel, "grows", {1: first, 2: second})
    os.ftruncate(second, 2 * PAGE)
    kernel.kexec_load(memfd_kernels.plain(kernel.machine))
    with pytest.raises(CallbackError) as refused:
        kernel.kexec()

    assert errno.EPERM == refused.value.errno
    assert ("FREEZE", "memfd-v2") == (refused.value.event, refused.value.name)
    assert [1, 2] == [file.token for file in session.files]
    os.pwrite(first, b"goes on", PAGE)
    os.ftruncate(second, PAGE)
    kernel.kexec_load(memfd_kernels.plain(kernel.machine))
    found, _ = files_of(kernel.kexec(), "grows")
    assert {1: told(first), 2: told(second)} == found


def test_closing_the_session_frees_everything(kernel, new):
    """Pages and keys are as before; the files are not closed."""
    files = various(new)
    preserve(kernel, "warm", files).close()
    before = kernel.machine.memory.nr_free_pages(), kernel.kho.nr_preserved
    preserve(kernel, "again", files).close()

    assert before == (kernel.machine.memory.nr_free_pages(), kernel.kho.nr_preserved)
    assert kernel.liveupdate.problems == ()
    assert pattern(4097) == os.pread(files[4], 5000, 0)


def test_finish_without_retrieve_frees_everything(new):
    """A session that is finished unseen leaves as much memory as one that was never there."""
    left = []
    for files in ({}, various(new)):
        kernel = memfd_kernels.plain(memfd_kernels.machine()).boot()
        preserve(kernel, "unseen", files)
        after = successor(kernel)
        with after.liveupdate.open() as node:
            session = node.retrieve_session("unseen")
        session.finish()
        session.close()
        assert after.liveupdate.problems == ()
        memory = after.machine.memory
        left.append((memory.nr_free_pages(), after.kho.incoming.nr_unrestored))

    assert left[0] == left[1]


@pytest.mark.parametrize("where", ["same", "other"])
def test_one_file_is_preserved_once(kernel, new, where):
    """A second descriptor of it is the same file: EBUSY."""
    fd = new(b"x")
    session = preserve(kernel, "one", {1: fd})
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    if where == "other":
        with kernel.liveupdate.open() as node:
            session = node.create_session("other")
    with pytest.raises(KhoError) as refused:
        session.preserve(again, 2)

    assert errno.EBUSY == refused.value.errno
    os.close(again)


def test_other_files_are_enoent(kernel):
    """Nobody keeps /dev/null, nor what is no file at all."""
    with kernel.liveupdate.open() as node:
        session = node.create_session("none")
    null = os.open("/dev/null", os.O_RDWR)
    for file in (null, "text", object()):
        with pytest.raises(KhoError) as refused:
            session.preserve(file, 1)
        assert errno.ENOENT == refused.value.errno
    os.close(null)
    with pytest.raises(KhoError) as refused:
        session.preserve(null, 1)
    assert errno.EBADF == refused.value.errno


def test_retrieved_twice_is_the_same_file(kernel, new):
    """Two descriptors share position and contents."""
    preserve(kernel, "twice", {7: new(b"contents")})
    after = successor(kernel)
    with after.liveupdate.open() as node:
        session = node.retrieve_session("twice")
    one, two = session.retrieve(7), session.retrieve(7)
    os.lseek(one, 4, os.SEEK_SET)

    assert one != two
    assert b"ents" == os.read(two, 9)
    session.close()
    assert b"contents" == os.pread(one, 9, 0)
    os.close(one)
    os.close(two)


@pytest.mark.parametrize("max_order", [0, 9])
def test_image_of_it_breaks_no_rule(new, max_order):
    """The reader of images, which knows the format on its own, finds every file as it is."""
    kernel = memfd_kernels.plain(memfd_kernels.machine(), max_order).boot()
    files = various(new)
    preserve(kernel, "image", files)
    with kernel.liveupdate.frozen():
        image = Image.from_kernel(kernel)
        assert [] == image.verify()
        decoded = next(tree for tree in image.survey.subtrees if tree.name == "LUO").decoded
    (session,) = decoded["sessions"]
    memory = kernel.machine.memory

    assert list(files) == [file["token"] for file in session["files"]]
    for file in session["files"]:
        fd, found = files[file["token"]], file["memfd"]
        facts = told(fd)
        assert [facts[key] for key in ("size", "pos", "seals")] == [
            found[key] for key in ("size", "pos", "seals")
        ]
        contents = b""
        for pfn, flags, index, order in found["folios"]:
            assert (3, len(contents) // PAGE) == (flags, index)
            contents += bytes(memory.view(pfn * PAGE, PAGE << order))
        assert max_order or all(folio[3] == 0 for folio in found["folios"])
        assert -(-facts["size"] // PAGE) * PAGE == len(contents)
        assert os.pread(fd, len(contents), 0) == contents[: facts["size"]]
        assert not any(contents[facts["size"] :])


def test_memfds_of_a_real_kernel_are_retrieved(shared):
    """Linux 7.3 left eleven; contents are compared where the dump has all pages."""
    place = shared / "golden" / "kho_v4_arm64"
    image = Image.load(place)
    manifest = json.loads((place / "manifest.json").read_text())
    kernel = memfd_kernels.plain(Machine(image.memory(), DeviceTree())).boot(image.handover)
    seen = 0
    for expected in manifest["sessions"]:
        found, session = files_of(kernel, expected["name"])
        assert len(expected["files"]) == len(found)
        for file in expected["files"]:
            got = found[int(file["token"], 16)]
            assert all(file[what] == got[what] for what in ("size", "pos", "seals"))
            if file["pages_stored"] == "all":
                assert file["sha256"] == got["sha256"]
                seen += 1
        session.close()

    assert 6 == seen
    assert kernel.liveupdate.problems == ()
