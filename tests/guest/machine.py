"""QEMU's arm64 machine with a real kernel in it: started, told what to do, and listened to.

::

    build = Build.find()                             # Image, init and stub, of `make kernel`
    run = boot(build, "open\\ncreate a\\nfile a 1 4096\\npoweroff")
    run.stages[0].results[-1].values["crc32"]

    with start(build, "open\\n…\\nkexec-load /stub\\nkexec") as guest:
        guest.wait_for_stub()                        # what crossed lies in memory now
        crossed = guest.handover()                   # as an image; dump_raw(path), dump_elf(path)

    run = boot(build, "open\\nretrieve-session a\\n…", image=crossed)     # a kernel that takes it

A guest does what its script says (init.c lists the commands) and says results in lines. A panic
ends a run at once; so does its time limit. Both are results, not errors: see :class:`Run`.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import re
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luo import Kernel
from luo.fdt import Fdt
from luo.image import Extent, Image, Survey
from luo.image import boot as luo_boot
from luo.image.dump import read_device_tree

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CMDLINE = (
    "console=ttyAMA0 earlycon=pl011,0x9000000 liveupdate=on kho=on panic=-1"
    " printk.devkmsg=on loglevel=8 rdinit=/init test_kho.max_mem=4096"
)
TIMEOUT = 120.0

_RESULT = re.compile(r"@ (\d+) (\S+) (.*)")
_STUB = re.compile(r"@ stub dtb=0x([0-9a-f]{16})")
_PANIC = re.compile(r"Kernel panic - not syncing: (.*)")
_WARNING = re.compile(
    r"WARNING: (.*)|refcount_t: (.*)|BUG: (.*)|Unable to handle (.*)|Internal error: (.*)"
)


@dataclass(frozen=True)
class Build:
    """What ``make kernel`` left.

    Attributes:
        image: the kernel.
        init: static PID 1.
        stub: a kernel that waits, to kexec into.
    """

    image: Path
    init: Path
    stub: Path

    @classmethod
    def find(cls) -> Build | None:
        """The newest build, in LUO_GUEST_CACHE or build/guest; None without one."""
        place = Path(os.environ.get("LUO_GUEST_CACHE") or ROOT / "build/guest") / "current"
        build = cls(place / "Image", place / "init", place / "stub")
        there = all(path.exists() for path in (build.image, build.init, build.stub))
        return build if there else None


@dataclass(frozen=True)
class Result:
    """One line of a guest: the command of a line of its script, and what came of it.

    Attributes:
        line: of the script, from 1; 0 for "start", which is the init's own.
        command: its first word.
        text: the rest of the answer.
    """

    line: int
    command: str
    text: str

    @property
    def values(self) -> dict[str, str]:
        """What it says as KEY=VALUE."""
        return dict(part.split("=", 1) for part in self.text.split() if "=" in part)

    @property
    def error(self) -> str | None:
        """Name of the errno, or None."""
        return self.values.get("error") if self.text.startswith("error=") else None


@dataclass
class Stage:
    """One kernel's life: what it answered, and what it warned of."""

    results: list[Result] = field(default_factory=list)
    console: list[str] = field(default_factory=list)

    def of(self, command: str) -> list[Result]:
        """Answers to a command, in order."""
        return [result for result in self.results if result.command == command]

    @property
    def errors(self) -> list[Result]:
        """Answers that are errors."""
        return [result for result in self.results if result.error is not None]

    @property
    def text(self) -> list[str]:
        """Lines that ``cat`` and ``ls`` gave."""
        return [r.text[2:] for r in self.results if r.text.startswith("| ")]

    @property
    def warnings(self) -> list[str]:
        """What the kernel warned of."""
        return [line for line in self.console if _WARNING.search(line)]

    @property
    def finished(self) -> bool:
        """Whether its script came to its end, a power-off or a kexec."""
        return any(r.command in ("poweroff", "end", "kexec") for r in self.results)


@dataclass
class Run:
    """A machine's life, from power-on to its end.

    Attributes:
        stages: one for each kernel that came as far as its init, and one more for what a kernel
            said that did not.
        console: every line.
        panic: what the kernel said when it gave up, or None.
        timed_out: it had to be ended.
        stub: address of the device tree, if the stub was reached.
        seconds: how long it took.
    """

    stages: list[Stage]
    console: list[str]
    panic: str | None
    timed_out: bool
    stub: int | None
    seconds: float

    @property
    def outcome(self) -> str:
        """``done``, ``panic: …`` or ``hang``."""
        if self.panic is not None:
            return f"panic: {self.panic}"
        return "hang" if self.timed_out else "done"


def parse(lines: Sequence[str]) -> list[Stage]:
    """Cut a console's lines into the lives of its kernels."""
    stages: list[Stage] = [Stage()]
    for line in lines:
        if "Booting Linux on physical CPU" in line and stages[-1].console:
            stages.append(Stage())
        stages[-1].console.append(line)
        if found := _RESULT.search(line):
            stages[-1].results.append(Result(int(found[1]), found[2], found[3].rstrip()))
    return stages


def cpio(files: Mapping[str, bytes], *, modes: Mapping[str, int] | None = None) -> bytes:
    """An initramfs archive ("newc"); a name may be nested, its directories must be listed before.

    Args:
        files: contents by name.
        modes: of those that are no plain files of mode 0755.
    """
    out = bytearray()
    entries = [*files.items(), ("TRAILER!!!", b"")]
    for inode, (name, data) in enumerate(entries, 1):
        raw = name.encode() + b"\0"
        mode = (modes or {}).get(name, 0o100755)
        device = (5, 1) if mode & 0o170000 == 0o020000 else (0, 0)
        numbers = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(raw), 0)
        out += b"070701" + b"".join(b"%08X" % number for number in numbers) + raw
        out += bytes(-len(out) % 4) + data
        out += bytes(-len(out) % 4)
    return bytes(out)


def initramfs(
    build: Build, scripts: Sequence[str], files: Mapping[str, bytes] | None = None
) -> bytes:
    """What a guest needs: init, its scripts (/script, /script2, …), and *files*.

    A kernel that is started from the guest finds the same files, so its script is among them.
    With more than one script the kernel is there as /Image; the stub is always there as /stub.
    """
    content = {"dev": b"", "dev/console": b"", "init": build.init.read_bytes()}
    modes = {"dev": 0o040755, "dev/console": 0o020600}
    content["stub"] = build.stub.read_bytes()
    if len(scripts) > 1:
        content["Image"] = build.image.read_bytes()
    for i, text in enumerate(scripts, 1):
        content["script" if i == 1 else f"script{i}"] = text.rstrip("\n").encode() + b"\n"
    content |= files or {}
    return cpio(content, modes=modes)


def next_kernel(number: int, cmdline: str = CMDLINE, image: str = "/Image") -> str:
    """The lines of a script that start script *number* in a new kernel by kexec."""
    return f"kexec-load {image} initrd=self {cmdline} luo_script=/script{number}\nkexec\n"


class Guest:
    """A machine that runs.

    Args:
        arguments: QEMU's, behind those that every guest has.
        directory: that names of files in them are relative to.
        timeout: seconds until it is ended.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        directory: Path | None = None,
        timeout: float = TIMEOUT,
    ) -> None:
        self._place = tempfile.TemporaryDirectory(prefix="luo-guest-")
        self.qmp_path = str(Path(self._place.name) / "qmp")
        self._qmp: socket.socket | None = None
        self._answers: Iterator[bytes] = iter(())
        self.timed_out = False
        self._began = time.monotonic()
        self._deadline = self._began + timeout
        self.lines: list[str] = []
        self._more = threading.Condition()
        self._process = subprocess.Popen(
            [
                luo_boot.QEMU, "-display", "none", "-monitor", "none", "-no-reboot",
                "-serial", "stdio", "-qmp", f"unix:{self.qmp_path},server=on,wait=off",
                *arguments,
            ],
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._listen, daemon=True)
        self._ended = False
        self._reader.start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for raw in self._process.stdout:
            with self._more:
                self.lines.append(raw.decode("utf-8", "backslashreplace").rstrip("\r\n"))
                self._more.notify_all()
        with self._more:
            self._ended = True
            self._more.notify_all()

    def wait(self, pattern: re.Pattern[str] | None = None) -> re.Match[str] | None:
        """Wait for a line, or for the end: a power-off, a panic, or the time limit."""
        at = 0
        while True:
            with self._more:
                while at == len(self.lines) and not self._ended:
                    left = self._deadline - time.monotonic()
                    if left <= 0:
                        self.timed_out = True
                        return None
                    self._more.wait(left)
                new, at = self.lines[at:], len(self.lines)
                ended = self._ended
            for line in new:
                if pattern is not None and (found := pattern.search(line)):
                    return found
            if any(_PANIC.search(line) for line in new):
                self._deadline = min(self._deadline, time.monotonic() + 1)
                with self._more:
                    self._more.wait_for(lambda: self._ended, 1)
                return None
            if ended and not new:
                return None

    def wait_for_stub(self) -> int:
        """Wait for the stub; address of the device tree that it was given.

        Raises:
            AssertionError: the machine ended without reaching it.
        """
        found = self.wait(_STUB)
        assert found is not None, "\n".join(["the stub was not reached:", *self.lines[-40:]])
        return int(found[1], 16)

    # ---- QMP ----

    def qmp(self, command: str, **arguments: Any) -> Any:
        """Carry out a command of QEMU's machine protocol."""
        if self._qmp is None:
            self._qmp = socket.socket(socket.AF_UNIX)
            self._qmp.settimeout(60)
            self._qmp.connect(self.qmp_path)
            self._answers = iter(self._qmp.makefile("rb"))
            next(self._answers)
            self.qmp("qmp_capabilities")
        request = {"execute": command, "arguments": arguments}
        self._qmp.sendall(json.dumps(request).encode())
        for line in self._answers:
            answer = json.loads(line)
            if "error" in answer:
                raise RuntimeError(f"{command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]
        raise RuntimeError(f"{command}: QEMU is gone")

    def read(self, phys: int, nbytes: int) -> bytes:
        """Bytes of guest memory."""
        path = Path(self._place.name) / "part"
        self.dump_raw(path, phys, nbytes)
        return path.read_bytes()

    def dump_raw(
        self, path: Path, phys: int = luo_boot.RAM_BASE, nbytes: int | None = None
    ) -> None:
        """Write guest memory to a file, without a head: all of it from RAM's begin on."""
        if nbytes is None:
            nbytes = self.qmp("query-memory-size-summary")["base-memory"]
        self.qmp("pmemsave", val=phys, size=nbytes, filename=str(path))

    def dump_elf(self, path: Path) -> None:
        """Write guest memory as an ELF core file."""
        self.qmp("stop")
        self.qmp("dump-guest-memory", paging=False, protocol=f"file:{path}")

    def device_tree(self, phys: int) -> bytes:
        """The flattened tree at an address."""
        (total,) = struct.unpack_from(">I", self.read(phys, 8), 4)
        return self.read(phys, total)

    def handover(self) -> Image:
        """What crosses, after :meth:`wait_for_stub`: the pages that matter, with contents."""
        found = self.run()
        assert found.stub is not None
        four, ranges = read_device_tree(Fdt(self.device_tree(found.stub)))
        low, high = min(ranges)[0], sum(max(ranges)[:2])
        path = Path(self._place.name) / "all"
        self.dump_raw(path, low, high - low)
        with path.open("rb") as file:
            memory = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        path.unlink()
        everything = [Extent(start, n, memory[start - low :][:n]) for start, n, _ in ranges]
        whole = Image(ranges, four, everything)
        spans = Survey(whole, formats=False).spans()
        return Image(ranges, four, [part for span in spans for part in whole.pieces(*span)])

    # ---- end ----

    def stop(self) -> None:
        """End the machine, and forget its files."""
        if self._qmp is not None:
            self._qmp.close()
        self._process.kill()
        self._process.wait()
        self._reader.join()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._place.cleanup()

    def run(self) -> Run:
        """What came of it; after :meth:`wait`."""
        with self._more:
            lines = list(self.lines)
        panics = [found[1] for line in lines if (found := _PANIC.search(line))]
        stubs = [int(found[1], 16) for line in lines if (found := _STUB.search(line))]
        return Run(
            parse(lines),
            lines,
            panics[0] if panics else None,
            self.timed_out,
            stubs[0] if stubs else None,
            time.monotonic() - self._began,
        )


@contextlib.contextmanager
def start(
    build: Build,
    scripts: str | Sequence[str],
    *,
    image: Image | Kernel | None = None,
    files: Mapping[str, bytes] | None = None,
    memory: int = 512 << 20,
    cmdline: str = CMDLINE,
    timeout: float = TIMEOUT,
    checked: bool = True,
) -> Iterator[Guest]:
    """Boot the kernel with the first script: with a handover, or cold.

    Args:
        build: kernel and init.
        scripts: of the first kernel, and of those that it starts.
        image: the handover, or the kernel whose it is; None: a cold boot.
        files: besides, in the initramfs.
        memory: bytes of it, without an image.
        cmdline: of the first kernel.
        timeout: seconds.
        checked: as of :func:`luo.image.boot.write`.
    """
    scripts = [scripts] if isinstance(scripts, str) else scripts
    with tempfile.TemporaryDirectory(prefix="luo-guest-") as name:
        place = Path(name)
        initrd = place / "initrd"
        initrd.write_bytes(initramfs(build, scripts, files))
        if image is None:
            arguments = [
                *luo_boot.machine_arguments(memory), "-kernel", str(build.image),
                "-initrd", str(initrd), "-append", cmdline,
            ]  # fmt: skip
        else:
            plan = luo_boot.write(
                image, place, kernel=build.image, initrd=initrd, cmdline=cmdline, checked=checked
            )
            assert plan.arguments is not None
            arguments = list(plan.arguments)
        guest = Guest(arguments, directory=place, timeout=timeout)
        try:
            yield guest
        finally:
            guest.stop()


def boot(build: Build, scripts: str | Sequence[str], **options: Any) -> Run:
    """Boot the kernel, and listen until its end; options as of :func:`start`."""
    with start(build, scripts, **options) as guest:
        guest.wait()
        return guest.run()
