"""The attribute tree: what is listed, who owns it, across jumps, and who is woken."""

import contextlib
import errno
import stat
import threading

import kernels
import pytest
from rig import SMALL, Log, errno_of, small_kernel, small_machine

from luo.errors import StateError
from luo.fdt import Fdt
from luo.kernel import KernelImage
from luo.liveupdate import Subsystem
from luo.machine import DeviceTree, Machine
from luo.sysfs import Tree, debug_files

STATE = "kernel/liveupdate/state"
PREPARE = "kernel/liveupdate/prepare"
FINISH = "kernel/liveupdate/finish"
KEXEC = "kernel/debug/liveupdate/kexec"
DISK = "devices/pci0/disk"
GROUP = ["requested", "preserved", "reclaimed"]
WHERE = pytest.mark.parametrize("in_process", [True, False], ids=["here", "process"])


@pytest.fixture
def log():
    return Log()


@pytest.fixture
def kernel(log):
    with small_kernel(small_machine(), log).boot() as kernel:
        yield kernel


@pytest.fixture
def tree(kernel):
    with Tree(kernel.machine) as tree:
        yield tree


@contextlib.contextmanager
def mounted_machine(in_process=False, **args):
    """A tree over a machine whose kernel can be followed by an image; all is closed at the end."""
    machine = kernels.machine()
    kernel = kernels.plain(machine, **args).boot()
    try:
        image = KernelImage("kernels:plain", args=args)
        with Tree(machine, image=image, in_process=in_process) as tree:
            yield tree
    finally:
        if machine.running is not None:
            machine.running.close()
        kernel.close()


@contextlib.contextmanager
def at_work(work):
    """Run *work* in a thread that has ended at the end; yields a list that gets what it raised."""
    raised = []

    def run():
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield raised
    finally:
        thread.join(60)
        assert not thread.is_alive()


# ---- what is there ----


def test_list_of_each_directory_is_what_the_kernel_has(tree):
    """Directories have devices in the order of adding, and the group last."""
    assert tree.list() == ["devices", "kernel"]
    assert tree.list("devices") == ["pci0"]
    assert tree.list("/devices/pci0/") == ["port", "disk", "liveupdate"]
    assert tree.list(DISK) == ["liveupdate"]
    assert tree.list(f"{DISK}/liveupdate") == GROUP
    assert tree.list("kernel") == ["liveupdate", "debug"]
    assert tree.list("kernel/liveupdate") == ["state", "prepare", "finish"]
    assert tree.list("kernel/debug") == ["liveupdate", "kho"]
    assert errno_of(tree.list, STATE) == errno.ENOTDIR
    assert errno_of(tree.list, "kernel/none") == errno.ENOENT


def test_walk_yields_every_file_once(tree):
    """Every device has three files, and all of them can be looked at."""
    files = list(tree.walk())

    assert len(set(files)) == len(files)
    assert sum(path.startswith("devices/") for path in files) == 3 * len(SMALL)
    assert all(stat.S_ISREG(tree.stat(path).mode) for path in files)


def test_list_after_devices_come_and_go_is_the_present(kernel, tree):
    """What is plugged in has a group at once, what is gone is not there."""
    assert tree.list("devices/pci0") == ["port", "disk", "liveupdate"]
    tree.machine.devices.add("new", "pci0", "pci", "nvme", state=b"new")
    tree.machine.devices.remove("pci0/port")

    assert tree.list("devices/pci0") == ["disk", "new", "liveupdate"]
    assert tree.write("devices/pci0/new/liveupdate/requested", "1") == 1
    assert kernel.devices["pci0/new"].requested
    assert errno_of(tree.list, "devices/pci0/port/nic0") == errno.ENOENT


def test_list_of_names_that_are_not_utf8_keeps_their_bytes():
    """Names come as ``os.fsdecode()`` has them, and lead back to the device."""
    devices = DeviceTree()
    devices.add(b"gr\xfcn".decode("utf-8", "surrogateescape"))
    with small_kernel(Machine("64MiB", devices), Log()).boot() as kernel:
        tree = Tree(kernel.machine)
        (name,) = tree.list("devices")

        assert tree.list(f"devices/{name}") == ["liveupdate"]


@pytest.mark.parametrize("cmdline", ["kho=on", "liveupdate=on"])
def test_tree_with_live_update_off_has_no_directory_of_it(cmdline):
    """No kernel/liveupdate and no device's group; the jump is there, for an ordinary kexec."""
    with small_kernel(small_machine(), Log(), cmdline=cmdline).boot() as kernel:
        tree = Tree(kernel.machine)

        assert errno_of(tree.read, STATE) == errno.ENOENT
        assert tree.list("kernel") == ["debug"]
        assert tree.list(DISK) == []
        assert errno_of(tree.write, f"{DISK}/liveupdate/requested", "1") == errno.ENOENT
        assert tree.list("kernel/debug/liveupdate") == ["reboot", "kexec"]
        assert ("kho" in tree.list("kernel/debug")) == (cmdline == "kho=on")


def test_tree_whose_directory_could_not_be_made_has_none():
    """A name in /sys/kernel that is taken costs LUO its directory."""
    kernel = small_kernel(small_machine(), Log())
    kernel.sysfs.add("liveupdate")
    with kernel.boot():
        tree = Tree(kernel.machine)

        assert errno_of(tree.read, STATE) == errno.ENOENT


def test_debug_files_show_the_live_root_tree_and_its_subtrees(kernel, tree):
    """The bytes are those in memory: the root tree, and LUO's blob once it is there."""
    out = "kernel/debug/kho/out"
    assert tree.list(f"{out}/sub_fdts") == ["kexec-metadata"]
    tree.write(PREPARE, "1")
    kernel.luo.reboot()

    names = [node.name for node in Fdt(tree.read(f"{out}/fdt")).root.children]
    assert sorted(tree.list(f"{out}/sub_fdts")) == sorted(names)
    blob = tree.read(f"{out}/sub_fdts/liveupdate_orchestrator")
    assert bytes(Fdt(blob).root["version"]) == (1).to_bytes(4, "little") + bytes(4)
    assert tree.stat(f"{out}/sub_fdts/liveupdate_orchestrator").size == len(blob)
    areas = "".join(f"{phys:#x}\n" for phys, _ in kernel.kho.scratch)
    assert tree.read(f"{out}/scratch_phys") == areas.encode()


def test_debug_files_of_a_kernel_in_another_process_are_its_own():
    """What a remote kernel has finalized is seen and done from here."""
    out = "kernel/debug/kho/out"
    with mounted_machine(kho_abi="kho-v5-series") as tree:
        tree.write(KEXEC, "1")
        assert tree.read(f"{out}/finalize") == b"0\n"
        assert errno_of(tree.read, f"{out}/fdt") == errno.ENOENT
        assert tree.write(f"{out}/fdt_max", "0x200000") == 8
        assert tree.read(f"{out}/fdt_max") == b"2097152\n"
        assert tree.write(f"{out}/finalize", "1") == 1
        assert Fdt(tree.read(f"{out}/fdt")).root["compatible"].tobytes() == b"kho-v1\0"
        assert errno_of(tree.write, f"{out}/finalize", "1") == errno.EEXIST
        assert tree.write(f"{out}/finalize", "0") == 1


def test_debug_files_read_of_a_kernel_that_goes_meanwhile_are_nobodys(kernel, monkeypatch):
    """Its pages may be the next kernel's when they are read: neither bytes nor their faults."""

    def go(kho):
        kernel.close()
        return bytes(64)  # as if the next kernel had cleared the page: no tree

    monkeypatch.setattr(type(kernel.kho), "root_copy", go)
    assert errno_of(debug_files, kernel) == errno.ESHUTDOWN


# ---- owners ----


def test_chown_of_a_device_changes_its_group_with_it(kernel, tree):
    """``device_change_owner()``: who owns the device may write its files, and nobody else."""
    requested = f"{DISK}/liveupdate/requested"
    tree.chown(f"{DISK}/liveupdate/preserved", 5, -1)
    tree.chown(DISK, 1000, 100)

    assert kernel.devices.owners == {4: (1000, 100)}
    for path in (DISK, f"{DISK}/liveupdate", requested, f"{DISK}/liveupdate/preserved"):
        assert tree.stat(path)[1:3] == (1000, 100)
    assert tree.write(requested, "1", uid=1000) == 1
    assert errno_of(tree.write, requested, "0", uid=1001, gid=100) == errno.EACCES
    tree.chmod(requested, 0o664)
    assert tree.write(requested, "0", uid=1001, gid=100) == 1


def test_chown_of_a_file_changes_only_that(tree):
    """Any other file has an owner of its own; a directory that is closed keeps users out."""
    tree.chown(PREPARE, 1000, -1)
    tree.chown(KEXEC, 1000, -1)

    assert tree.stat(PREPARE)[1:3] == (1000, 0)
    assert tree.stat(FINISH)[1:3] == (0, 0)
    assert tree.write(PREPARE, "1", uid=1000, gid=1000) == 1
    assert errno_of(tree.write, KEXEC, "1", uid=1000, gid=1000) == errno.EACCES


def test_chown_with_live_update_off_is_enoent_under_the_quirk():
    """RFC v1 quirk 17, and what was meant."""
    for quirks, code in (((), None), (("change-owner-fails",), errno.ENOENT)):
        machine = small_machine()
        with small_kernel(machine, Log(), cmdline="kho=on", quirks=quirks).boot():
            assert errno_of(Tree(machine).chown, DISK, 1000, 1000) == code


# ---- jumps ----


@WHERE
def test_two_updates_by_files_go_through_three_kernels(in_process):
    """The tree stays, whoever answers; a device is kept, reclaimed and let go each time."""
    with mounted_machine(in_process=in_process) as tree:
        tree.load()
        for _ in range(2):
            before = tree.machine.running
            tree.write(f"{DISK}/liveupdate/requested", "1\n")
            tree.write(PREPARE, "1\n")
            assert tree.read(STATE) == b"prepared\n"
            assert tree.read(f"{DISK}/liveupdate/preserved") == b"1\n"
            tree.write(KEXEC, "1\n")
            assert tree.machine.running is not before
            assert tree.read(STATE) == b"updated\n"
            flags = [tree.read(f"{DISK}/liveupdate/{flag}") for flag in GROUP]
            assert flags == [b"0\n", b"1\n", b"1\n"]
            assert "liveupdate_orchestrator" in tree.list("kernel/debug/kho/in/sub_fdts")
            assert errno_of(tree.read, "kernel/debug/kho/out/fdt") == errno.ENOENT
            tree.write(FINISH, "1\n")
            assert tree.read(STATE) == b"normal\n"
        assert tree.machine.running.kexec_loaded


def test_events_that_succeed_in_any_case_log_what_failed(caplog, log, kernel, tree):
    """CANCEL and FINISH end in NORMAL; which callback failed, and why, is in the log."""
    log.faults["CANCEL", "driver", "nvme", "pci0/disk"] = -errno.EIO
    tree.write(f"{DISK}/liveupdate/requested", "1")
    tree.write(PREPARE, "1")
    tree.write(PREPARE, "0")

    assert tree.read(STATE) == b"normal\n"
    assert "CANCEL driver nvme" in caplog.text
    assert "pci0/disk" in caplog.text
    assert "EIO" in caplog.text


@WHERE
def test_owners_and_permissions_after_a_jump_are_those_of_the_new_kernel(in_process):
    """A new kernel makes its files anew."""
    with mounted_machine(in_process=in_process) as tree:
        tree.chown(DISK, 1000, 1000)
        tree.chmod(STATE, 0o400)
        tree.write(KEXEC, "1")

        assert tree.stat(DISK)[1:3] == (0, 0)
        assert stat.S_IMODE(tree.stat(STATE).mode) == 0o444
        tree.chown(DISK, 1000, 1000)
        assert tree.stat(f"{DISK}/liveupdate/requested")[1:3] == (1000, 1000)


def test_kexec_that_fails_leaves_the_next_kernel_loaded_again():
    """A successor that refuses costs the update, not the image."""
    machine = kernels.machine()
    with kernels.plain(machine).boot() as kernel:
        tree = Tree(machine, image=KernelImage("kernels:refuses"), in_process=True)
        tree.write(PREPARE, "1")

        # validate() of the image raises HandoverError, which is EPROTO of the jump
        assert errno_of(tree.write, KEXEC, "1") == errno.EPROTO
        assert tree.read(STATE) == b"normal\n"
        assert kernel.kexec_loaded


def test_load_keeps_what_somebody_has_loaded(kernel, tree):
    """Who loaded a kernel by hand jumps into that one."""
    mine = small_kernel(kernel.machine, Log(), release="mine")
    tree.image = KernelImage("kernels:no_such")
    kernel.kexec_load(mine)
    tree.load()
    tree.image = None
    tree.write(KEXEC, "1")

    assert kernel.machine.running is mine


def test_tree_of_a_machine_that_is_off_is_enodev():
    """Nothing answers but the first directories; the next kernel brings it back."""
    machine = small_machine()
    tree = Tree(machine)

    assert tree.list() == ["devices", "kernel"]
    assert stat.S_ISDIR(tree.stat().mode)
    for call in (tree.read, tree.list, tree.stat, tree.open):
        assert errno_of(call, STATE) == errno.ENODEV
    assert errno_of(tree.write, PREPARE, "1") == errno.ENODEV
    assert errno_of(tree.load) == errno.ENODEV
    with small_kernel(machine, Log()).boot():
        assert tree.read(STATE) == b"normal\n"


# ---- at the same time ----


def waits_in(event):
    """Return a subsystem whose callback of *event* waits, and the events that say so and end it."""
    begun, go_on = threading.Event(), threading.Event()

    def wait(context):
        begun.set()
        assert go_on.wait(60)

    return Subsystem("waits", **{event: wait}), begun, go_on


def test_reads_while_a_callback_runs_do_not_wait():
    """State and flags are read without the lock; the state is the old one until all is done."""
    waits, begun, go_on = waits_in("prepare")
    machine = small_machine()
    with small_kernel(machine, Log(), [waits]).boot():
        tree = Tree(machine)
        with at_work(lambda: tree.write(PREPARE, "1")) as raised:
            assert begun.wait(60)
            seen = tree.read(STATE), tree.read(f"{DISK}/liveupdate/preserved")
            same = tree.write(f"{DISK}/liveupdate/requested", "0")  # as it is: no lock (1.9)
            go_on.set()
        assert (seen, same, raised) == ((b"normal\n", b"0\n"), 1, [])
        assert tree.read(STATE) == b"prepared\n"


def test_kill_of_a_write_that_waits_for_the_lock_is_eagain():
    """RFC v1 1.4: a fatal signal ends the wait, and nothing has changed."""
    waits, begun, go_on = waits_in("prepare")
    machine = small_machine()
    with small_kernel(machine, Log(), [waits]).boot() as kernel:
        tree = Tree(machine)
        with at_work(lambda: tree.write(PREPARE, "1")), contextlib.ExitStack() as stack:
            assert begun.wait(60)
            writer = threading.Event()
            ident = []

            def write():
                ident.append(threading.get_ident())
                writer.set()
                tree.write(f"{DISK}/liveupdate/requested", "1")

            raised = stack.enter_context(at_work(write))
            assert writer.wait(60)
            while not raised:  # it may not wait yet
                tree.kill(ident[0])
            go_on.set()
        assert raised[0].errno == errno.EAGAIN
        assert not kernel.devices.requested.any()


def test_read_during_a_jump_waits_for_the_new_kernel():
    """Between the kernels user space stands still: nobody sees a kernel that boots."""
    waits, begun, go_on = waits_in("restore")
    machine = small_machine()
    kernel = small_kernel(machine, Log(), [Subsystem("waits")]).boot()
    following = small_kernel(machine, Log(), [waits])
    with kernel, following:
        tree = Tree(machine)
        kernel.kexec_load(following)
        tree.write(PREPARE, "1")
        seen = []
        with at_work(lambda: tree.write(KEXEC, "1")) as raised:
            assert begun.wait(60)
            with at_work(lambda: seen.append(tree.read(STATE))):
                early = list(seen)
                go_on.set()
        assert (early, seen, raised) == ([], [b"updated\n"], [])


def test_reads_over_jumps_between_processes_never_fail():
    """Whatever a reader asks while a kernel leaves is answered by it or by the next one."""
    with mounted_machine() as tree:
        tree.write(KEXEC, "1")  # from here on every kernel is in another process
        ended = threading.Event()
        seen = set()

        def read(path):
            while not ended.is_set():
                seen.add(tree.read(path))

        with (
            at_work(lambda: read(STATE)) as first,
            at_work(lambda: read(f"{DISK}/liveupdate/preserved")) as second,
            at_work(
                lambda: [tree.list("kernel/debug/kho/out") for _ in iter(ended.is_set, True)]
            ) as third,
        ):
            try:
                for _ in range(5):
                    tree.write(f"{DISK}/liveupdate/requested", "1")
                    tree.write(PREPARE, "1")
                    tree.write(KEXEC, "1")
                    tree.write(FINISH, "1")
            finally:
                ended.set()
        assert (first, second, third) == ([], [], [])
        assert seen <= {b"normal\n", b"prepared\n", b"updated\n", b"0\n", b"1\n"}


@pytest.mark.parametrize("cleared", [False, True], ids=["on", "off"])
def test_read_of_a_kernel_that_says_it_is_gone_waits_for_the_jump(cleared, monkeypatch):
    """ESHUTDOWN in the midst of a jump is not for the reader, whatever is cleared first."""
    with mounted_machine() as tree:
        tree.write(KEXEC, "1")
        old = tree.machine.running
        read, asked = [], threading.Event()
        flags, depart = type(old.devices)._flags, type(old).depart

        def gone(devices, name):
            if devices is old.devices:
                asked.set()
                raise StateError(errno.ESHUTDOWN, "gone")
            return flags(devices, name)

        def leave(kernel):
            reader.start()
            assert asked.wait(60)
            if cleared:
                tree.machine.running = None
            depart(kernel)

        def ask():
            try:
                read.append(tree.read(f"{DISK}/liveupdate/requested"))
            except OSError as error:
                read.append(error)

        reader = threading.Thread(target=ask, daemon=True)
        monkeypatch.setattr(type(old.devices), "_flags", gone)
        monkeypatch.setattr(type(old), "depart", leave)
        tree.write(KEXEC, "1")
        reader.join(60)
        assert read == [b"0\n"]


def test_kexec_during_a_jump_is_ebusy():
    """One jump at a time, as in Linux."""
    waits, begun, go_on = waits_in("reboot")
    machine = small_machine()
    with small_kernel(machine, Log(), [waits]).boot() as kernel, Tree(machine) as tree:
        kernel.kexec_load(small_kernel(machine, Log(), [Subsystem("waits")]))
        tree.write(PREPARE, "1")
        with at_work(lambda: tree.write(KEXEC, "1")) as raised:
            assert begun.wait(60)
            second = errno_of(tree.write, KEXEC, "1")
            go_on.set()
        assert (second, raised) == (errno.EBUSY, [])
        assert tree.read(STATE) == b"updated\n"
        machine.running.close()


def test_write_that_waits_while_the_kernel_goes_is_enodev(kernel, tree):
    """What was written to a kernel that is gone is not written to the next."""
    real = kernel.devices.request_one

    def gone(index, on):
        kernel.close()
        real(index, on)

    kernel.devices.request_one = gone

    assert errno_of(tree.write, f"{DISK}/liveupdate/requested", "1") == errno.ENODEV


# ---- polling ----


def test_open_file_has_changed_until_it_is_read_and_after_a_notification(tree):
    """As poll() on sysfs: at once before the first read, then at each notification."""
    file = tree.open(STATE)

    assert file.changed
    assert file.read() == b"normal\n"
    assert not file.changed
    assert not file.wait(0)
    tree.write(PREPARE, "1")
    assert file.wait(0)
    assert file.read(4, 2) == b"rmal"  # what was read from the start stays
    assert file.read() == b"prepared\n"
    assert not file.changed


def test_poll_wakes_when_the_state_changes(tree):
    """Who waits on state is woken by PREPARE, and not by a request."""
    with at_work(lambda: tree.write(PREPARE, "1")):
        assert tree.open(STATE).wait(60)
    tree.write(f"{DISK}/liveupdate/requested", "0")

    assert not tree.poll(STATE, 0)


def test_poll_of_state_under_the_quirk_never_wakes():
    """RFC v1 quirk 3: another path is notified, which is no file."""
    machine = small_machine()
    with small_kernel(machine, Log(), quirks=["poll-never-wakes"]).boot():
        tree = Tree(machine)
        file = tree.open(STATE)
        file.read()
        tree.write(PREPARE, "1")

        assert tree.read(STATE) == b"prepared\n"
        assert not file.changed
        assert tree.events("kernel/state") == 2


@WHERE
def test_poll_wakes_at_a_jump_and_in_the_new_kernel(in_process):
    """A jump wakes whoever polls: the file that was open is of a kernel that is gone."""
    with mounted_machine(in_process=in_process) as tree:
        file = tree.open(STATE)
        tree.write(PREPARE, "1")
        file.read()
        tree.write(KEXEC, "1")
        assert file.wait(60)
        assert file.read() == b"updated\n"
        tree.write(FINISH, "1")
        assert file.wait(60)
        assert file.read() == b"normal\n"


def test_close_lets_the_machine_go(tree):
    """A tree that is closed is told nothing any more."""
    tree.close()
    tree.write(PREPARE, "1")

    assert tree.events(STATE) == 1
    assert tree.machine.watchers == []
