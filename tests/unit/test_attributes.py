"""The attributes as tables: which numbers they read, and what each answers in each state."""

import errno
import stat

import pytest
from rig import Log, errno_of, small_kernel, small_machine, updated

from luo.errors import KhoError
from luo.sysfs import Tree, debug_files, parse_long

STATE = "kernel/liveupdate/state"
PREPARE = "kernel/liveupdate/prepare"
FINISH = "kernel/liveupdate/finish"
REBOOT = "kernel/debug/liveupdate/reboot"
KEXEC = "kernel/debug/liveupdate/kexec"
KHO = "kernel/debug/kho"
REQUESTED = "devices/pci0/disk/liveupdate/requested"
PRESERVED = "devices/pci0/disk/liveupdate/preserved"
RECLAIMED = "devices/pci0/disk/liveupdate/reclaimed"

ONE = [
    b"1",
    b"1\n",
    b"+1",
    b"0x1",
    b"0X1",
    b"01",
    b"001",
    b"+0x1\n",
    b"1\0rest",
    b"0" * 4000 + b"1",
]
ZERO = [b"0", b"0\n", b"-0", b"+0", b"00", b"0x0", b"-0x0", b"0\0"]
NEITHER = [
    b"", b"\n", b" 1", b"1 ", b"1\n\n", b"\n1", b"\t1", b"2", b"-1", b"yes", b"on", b"y", b"0b1",
    b"0o1", b"1.0", b"1e0", b"010", b"08", b"0x", b"0xg", b"x1", b"1_0", b"+", b"-", b"++1", b"+-1",
    b"-+1", b"--1", b"1\r\n", b"\xc2\xb9", b"\xff", b"\0", b"\x001", b"9223372036854775808",
    b"18446744073709551617", b"0x10000000000000001", b"9" * 4096,
]  # fmt: skip


@pytest.fixture
def kernel():
    kernel = small_kernel(small_machine(), Log()).boot()
    yield kernel
    kernel.machine.running.close()
    kernel.close()


@pytest.fixture
def tree(kernel):
    with Tree(kernel.machine) as tree:
        yield tree


def into(kernel, state):
    """Bring the machine of *kernel* into *state*, with the disk requested."""
    kernel.devices.request("pci0/disk")
    if state == "prepared":
        kernel.luo.prepare()
    elif state == "updated":
        updated(kernel, small_kernel(kernel.machine, Log()))


# ---- the grammar (RFC v1 1.5) ----


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((text, 1) for text in ONE),
        *((text, 0) for text in ZERO),
        (b"010", 8),
        (b"-17", -17),
        (b"0x7fffffffffffffff", (1 << 63) - 1),
        (b"-9223372036854775808\n", -(1 << 63)),
        (b"0777777777777777777777", (1 << 63) - 1),
    ],
)
def test_parse_long_of_what_kstrtol_takes_is_its_value(text, value):
    """Sign, base and newline are read as the kernel reads them."""
    assert parse_long(text) == value


@pytest.mark.parametrize("text", [b"", b"\n", b" 1", b"1 ", b"1\n\n", b"08", b"0x", b"+-1", b"\0"])
def test_parse_long_of_no_number_is_einval(text):
    """What is no number is EINVAL."""
    assert errno_of(parse_long, text) == errno.EINVAL


@pytest.mark.parametrize(
    "text",
    [b"9223372036854775808", b"-9223372036854775809", b"0x8000000000000000", b"9" * 99 + b"x"],
)
def test_parse_long_of_a_larger_number_is_erange(text):
    """A number of more than 63 bits is ERANGE, whatever stands behind it."""
    assert errno_of(parse_long, text) == errno.ERANGE


@pytest.mark.parametrize("text", ONE)
@pytest.mark.parametrize("path", [PREPARE, FINISH, REQUESTED])
def test_write_of_a_one_takes_every_byte(kernel, tree, path, text):
    """Each spelling of 1 is taken, and success is the number of bytes."""
    if path == FINISH:
        into(kernel, "updated")

    assert tree.write(path, text) == len(text)
    assert tree.read(STATE) == (b"prepared\n" if path == PREPARE else b"normal\n")


@pytest.mark.parametrize("text", ZERO)
@pytest.mark.parametrize("path", [PREPARE, REQUESTED])
def test_write_of_a_zero_takes_every_byte(kernel, tree, path, text):
    """Each spelling of 0 is taken."""
    into(kernel, "prepared" if path == PREPARE else "normal")

    assert tree.write(path, text) == len(text)
    assert (tree.read(STATE), tree.read(PRESERVED)) == (b"normal\n", b"0\n")


@pytest.mark.parametrize("text", NEITHER)
@pytest.mark.parametrize("path", [PREPARE, FINISH, REQUESTED, REBOOT, KEXEC])
def test_write_of_anything_else_is_einval(tree, path, text):
    """What is neither 0 nor 1 is EINVAL in every file; what is too large is EINVAL too."""
    assert errno_of(tree.write, path, text) == errno.EINVAL


@pytest.mark.parametrize("text", ZERO)
@pytest.mark.parametrize("path", [FINISH, REBOOT, KEXEC])
def test_write_of_a_zero_where_only_1_is_taken_is_einval(kernel, tree, path, text):
    """FINISH, REBOOT and the jump cannot be taken back."""
    into(kernel, "updated" if path == FINISH else "prepared")

    assert errno_of(tree.write, path, text) == errno.EINVAL


def test_write_of_more_than_a_page_takes_the_first_page(tree):
    """As sysfs does: what is behind the first 4096 bytes is left to the next write."""
    assert tree.write(REQUESTED, b"0" * 4095 + b"1" + b"junk") == 4096
    assert tree.read(REQUESTED) == b"1\n"


# ---- who may do what when (RFC v1 1.4, 1.9) ----

INVALID = errno.EINVAL


@pytest.mark.parametrize(
    ("state", "path", "text", "code", "after"),
    [
        ("normal", PREPARE, "1", None, "prepared"),
        ("prepared", PREPARE, "1", INVALID, "prepared"),
        ("updated", PREPARE, "1", INVALID, "updated"),
        ("normal", PREPARE, "0", INVALID, "normal"),
        ("prepared", PREPARE, "0", None, "normal"),
        ("updated", PREPARE, "0", INVALID, "updated"),
        ("normal", FINISH, "1", INVALID, "normal"),
        ("prepared", FINISH, "1", INVALID, "prepared"),
        ("updated", FINISH, "1", None, "normal"),
        ("normal", REBOOT, "1", INVALID, "normal"),
        ("prepared", REBOOT, "1", None, "normal"),
        ("updated", REBOOT, "1", INVALID, "updated"),
        ("normal", KEXEC, "1", INVALID, "normal"),  # no image is loaded
        ("prepared", KEXEC, "1", INVALID, "prepared"),
        ("updated", KEXEC, "1", INVALID, "updated"),
        ("normal", REQUESTED, "1", None, "normal"),  # as it is
        ("prepared", REQUESTED, "1", None, "prepared"),
        ("updated", REQUESTED, "1", INVALID, "updated"),  # a kernel begins without requests
        ("normal", REQUESTED, "0", None, "normal"),
        ("prepared", REQUESTED, "0", INVALID, "prepared"),
        ("updated", REQUESTED, "0", None, "updated"),
        ("normal", STATE, "1", errno.EIO, "normal"),
        ("normal", PRESERVED, "1", errno.EIO, "normal"),
        ("normal", RECLAIMED, "1", errno.EIO, "normal"),
        ("normal", f"{KHO}/out/fdt", "1", errno.EIO, "normal"),
        ("normal", f"{KHO}/out/finalize", "1", errno.ENOENT, "normal"),
        ("normal", "kernel/liveupdate/cancel", "1", errno.ENOENT, "normal"),
        ("normal", "kernel/liveupdate", "1", errno.EISDIR, "normal"),
        ("normal", "devices/pci0/disk", "1", errno.EISDIR, "normal"),
        ("normal", f"{STATE}/more", "1", errno.ENOTDIR, "normal"),
        ("normal", "devices/pci0/none/liveupdate/requested", "1", errno.ENOENT, "normal"),
    ],
)
def test_write_in_a_state_has_its_errno(kernel, tree, state, path, text, code, after):
    """Each file in each state is taken or refused as the transition table says."""
    into(kernel, state)

    assert errno_of(tree.write, path, text) == code
    assert tree.read(STATE) == f"{after}\n".encode()


@pytest.mark.parametrize(
    ("path", "mode", "root", "user"),
    [
        (STATE, 0o444, None, None),
        (PREPARE, 0o200, errno.EIO, errno.EACCES),
        (FINISH, 0o200, errno.EIO, errno.EACCES),
        (REQUESTED, 0o644, None, None),
        (PRESERVED, 0o444, None, None),
        (RECLAIMED, 0o444, None, None),
        (REBOOT, 0o200, errno.EIO, errno.EACCES),
        (KEXEC, 0o200, errno.EIO, errno.EACCES),
        (f"{KHO}/out/fdt", 0o400, None, errno.EACCES),
        (f"{KHO}/out/scratch_phys", 0o400, None, errno.EACCES),
    ],
)
def test_read_as_root_and_as_user_follows_the_mode(tree, path, mode, root, user):
    """Modes are RFC v1's and debugfs's; nobody reads a write-only file, users not even open it."""
    found = tree.stat(path)

    assert (found.mode, found.uid, found.gid) == (stat.S_IFREG | mode, 0, 0)
    assert errno_of(tree.read, path) == root
    assert errno_of(tree.read, path, uid=1000, gid=1000) == user


@pytest.mark.parametrize("path", [STATE, PREPARE, FINISH, REQUESTED, PRESERVED, REBOOT, KEXEC])
def test_write_as_user_is_eacces(tree, path):
    """Only root writes, whatever is written."""
    assert errno_of(tree.write, path, "no number", uid=1000, gid=1000) == errno.EACCES


# ---- KHO's files by generation (kho-abi 2.7, 3.5, 10.5) ----

SCRATCH = {"out/scratch_phys", "out/scratch_len"}
METADATA = {"out/sub_fdts/kexec-metadata"}
NODE = "sub_fdts/liveupdate_orchestrator"


@pytest.mark.parametrize(
    ("kho_abi", "cold", "prepared", "new"),
    [
        (
            "kho-v5-series",
            {"out/finalize", "out/fdt_max"},
            set(),
            {"out/finalize", "out/fdt_max", "in/fdt"},
        ),
        (
            "kho-v1-512",
            {"out/finalize"},
            {"out/fdt", f"out/{NODE}"},
            {"out/finalize", "in/fdt", f"in/{NODE}"},
        ),
        (
            "kho-v1-notifier",
            {"out/finalize"},
            {"out/fdt", f"out/{NODE}"},
            {"out/finalize", "in/fdt", f"in/{NODE}"},
        ),
        ("kho-v1", {"out/finalize", "out/fdt"}, set(), {"out/finalize", "in/fdt", f"in/{NODE}"}),
        ("kho-v2", {"out/fdt"}, set(), {"in/fdt", f"in/{NODE}"}),
        (
            "kho-v4",
            {"out/fdt", *METADATA},
            set(),
            {*METADATA, "in/fdt", f"in/{NODE}", "in/sub_fdts/kexec-metadata"},
        ),
    ],
)
def test_debug_files_are_those_of_the_generation(kho_abi, cold, prepared, new):
    """Which files there are depends on the generation, on PREPARE, and on how the kernel came."""
    kernel = small_kernel(small_machine(), Log(), kho_abi=kho_abi).boot()
    kernel.devices.request("pci0/disk")

    assert set(debug_files(kernel)) == SCRATCH | cold
    kernel.luo.prepare()
    assert set(debug_files(kernel)) == SCRATCH | cold | prepared
    with updated(kernel, small_kernel(kernel.machine, Log(), kho_abi=kho_abi)) as following:
        assert set(debug_files(following)) == SCRATCH | new


@pytest.mark.parametrize(
    ("kho_abi", "writes"),
    [
        (
            "kho-v5-series",
            [(0, errno.ENOENT), (2, INVALID), (1, None), (1, errno.EEXIST), (0, None)],
        ),
        ("kho-v1-512", [(0, errno.ENOENT), (2, INVALID), (1, None), (1, errno.EEXIST), (0, None)]),
        ("kho-v1-notifier", [(0, errno.ENOENT), (1, None), (1, errno.EEXIST), (0, None)]),
        ("kho-v1", [(0, INVALID), (2, INVALID), (1, None), (1, None), (0, INVALID)]),
    ],
)
def test_write_of_finalize_is_the_generations(kho_abi, writes):
    """1 finalizes, 0 takes it back where that is possible."""
    with small_kernel(small_machine(), Log(), kho_abi=kho_abi).boot() as kernel:
        tree, path = Tree(kernel.machine), f"{KHO}/out/finalize"

        assert stat.S_IMODE(tree.stat(path).mode) == 0o600
        assert tree.read(path) == b"0\n"
        for value, code in writes:
            assert errno_of(tree.write, path, f"{value}\n") == code
            assert tree.read(path) == b"%d\n" % kernel.kho.finalized
        assert tree.read(f"{KHO}/out/scratch_len").startswith(b"0x")


def test_write_of_fdt_max_is_bytes_until_finalized():
    """``fdt_max`` is decimal when read, a number when written, and EBUSY once the tree is fixed."""
    with small_kernel(small_machine(), Log(), kho_abi="kho-v5-series").boot() as kernel:
        tree, path = Tree(kernel.machine), f"{KHO}/out/fdt_max"

        assert tree.read(path) == b"10485760\n"
        assert tree.write(path, "0x100000\n") == 9
        assert tree.read(path) == b"1048576\n"
        assert errno_of(tree.write, path, "-1") == INVALID
        tree.write(f"{KHO}/out/finalize", "1")
        assert errno_of(tree.write, path, "4096") == errno.EBUSY


def test_prepare_after_a_finalize_by_hand_is_ebusy():
    """RFC v1 1.13: a tree finalized by hand makes the next PREPARE of LUO fail with EBUSY."""
    with small_kernel(small_machine(), Log(), kho_abi="kho-v5-series").boot() as kernel:
        tree = Tree(kernel.machine)
        tree.write(f"{KHO}/out/finalize", "1")

        with pytest.raises(KhoError) as caught:
            tree.write(PREPARE, "1")
        assert caught.value.errno == errno.EBUSY
