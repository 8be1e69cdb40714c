"""The same calls, to a real kernel and to ours: every answer is the same."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import random
import zlib
from collections.abc import Iterator

import by_luo
import pytest
from machine import Build, boot, next_kernel
from shapes import MIB, File, word

from luo import Kernel
from luo.image.boot import virt_machine
from luo.session import DeviceNode, Session

NAMES = (b"a", b"b", b"c", b"n" * 63)
WRONG_NAMES = (b"n" * 64, b"n" * 80)
TOKENS = (0, 1, 2, (1 << 64) - 1)


class Ours:
    """Does what the guest's init does, with our kernel.

    Attributes:
        kernel: that runs.
        answers: what each line gave: ``ok``, with values for some; or the errno's name.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.answers: list[str] = []
        self.device: DeviceNode | None = None
        self.sessions: list[tuple[bytes, Session]] = []
        self.files: list[tuple[bytes, int, int]] = []

    def session(self, name: bytes) -> Session:
        for known, session in reversed(self.sessions):
            if known == name[:64]:
                return session
        raise OSError(errno.EBADF, "")

    def node(self) -> DeviceNode:
        if self.device is None:
            raise OSError(errno.EBADF, "")
        return self.device

    def fd(self, name: bytes, token: int) -> int:
        for known, number, fd in reversed(self.files):
            if (known, number) == (name[:64], token):
                return fd
        return -1

    def do(self, words: tuple[object, ...]) -> None:
        """Carry out a line."""
        try:
            text = getattr(self, f"do_{str(words[0]).replace('-', '_')}")(*words[1:])
        except OSError as error:
            text = errno.errorcode[error.errno or 0]
        self.answers.append(text or "ok")

    def do_open(self) -> None:
        node = self.kernel.liveupdate.open()
        self.device = node

    def do_close_device(self) -> None:
        if self.device is not None:
            self.device.close()
        self.device = None

    def do_create(self, name: bytes) -> None:
        self.sessions.append((name[:64], self.node().create_session(name)))

    def do_retrieve_session(self, name: bytes) -> None:
        self.sessions.append((name[:64], self.node().retrieve_session(name)))

    def do_name(self, name: bytes) -> str:
        return f"ok {os.fsencode(self.session(name).name)!r}"

    def do_finish(self, name: bytes) -> None:
        self.session(name).finish()

    def do_close(self, name: bytes) -> None:
        session = self.session(name)
        self.sessions = [pair for pair in self.sessions if pair[1] is not session]
        session.close()
        for known, _, fd in self.files:
            if known == name[:64]:
                os.close(fd)
        self.files = [row for row in self.files if row[0] != name[:64]]

    def do_file(self, name: bytes, file: File) -> None:
        session = self.session(name)
        fd = by_luo.memfd(file)
        try:
            session.preserve(fd, file.token)
        except OSError:
            os.close(fd)
            raise
        self.files.append((name[:64], file.token, fd))

    def do_preserve(self, name: bytes, token: int, path: str) -> None:
        session = self.session(name)
        try:
            fd = os.open(path, os.O_RDWR)
        except OSError:
            fd = -1
        try:
            session.preserve(fd, token)
        finally:
            if fd >= 0:
                os.close(fd)

    def do_again(self, name: bytes, token: int, other: bytes, number: int) -> None:
        self.session(name).preserve(self.fd(other, number), token)

    def do_retrieve(self, name: bytes, token: int) -> str:
        fd = self.session(name).retrieve(token)
        self.files.append((name[:64], token, fd))
        data = os.pread(fd, os.fstat(fd).st_size, 0)
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        return f"ok {len(data)} {os.lseek(fd, 0, os.SEEK_CUR)} {seals} {zlib.crc32(data)}"

    def end(self) -> None:
        """The process ends with its kernel."""
        for _, _, fd in self.files:
            os.close(fd)


def line(words: tuple[object, ...]) -> str:
    """A command as the guest's init reads it."""
    out = []
    for part in words:
        if isinstance(part, bytes):
            out.append(word(part))
        elif isinstance(part, File):
            out += [f"{part.token:#x} {part.size} pos={part.pos} seals={part.seals:#x}"]
        else:
            out.append(str(part))
    return " ".join(out)


def draw(rng: random.Random, *, after: bool) -> tuple[object, ...]:
    """A command that may well be wrong."""
    name, other = rng.choice(NAMES), rng.choice(NAMES)
    token = rng.choice(TOKENS)
    file = File(
        token, rng.choice((0, 1, 5000, 20000)), pos=rng.choice((0, 7)), seals=rng.choice((0, 6))
    )
    often = {"create": 6, "file": 8, "again": 4, "preserve": 2, "name": 2, "close": 2, "open": 3}
    often |= {"finish": 3, "retrieve": 10, "retrieve-session": 8} if after else {
        "finish": 1, "retrieve": 1, "retrieve-session": 1
    }  # fmt: skip
    often |= {} if after else {"close-device": 1}
    command = rng.choices(list(often), list(often.values()))[0]
    if command in ("open", "close-device"):
        return (command,)
    if command == "create" and rng.random() < 0.1:
        return command, rng.choice(WRONG_NAMES)
    if command == "file":
        return command, name, file
    if command == "again":
        return command, name, token, other, rng.choice(TOKENS)
    if command == "preserve":
        return command, name, token, rng.choice(("/dev/null", "/nowhere"))
    if command == "retrieve":
        return command, name, token
    return command, name


def commands(seed: int, *, after: bool) -> list[tuple[object, ...]]:
    """A script: it begins with what makes the rest worth while."""
    rng = random.Random(seed)
    rows: list[tuple[object, ...]] = [("open",)]
    if not after:
        rows += [("create", name) for name in NAMES[:2]]
    drawn = [draw(rng, after=after) for _ in range(200)]
    if after:
        return [*rows, *(("retrieve-session", name) for name in NAMES[:2]), *drawn]
    # What crosses should be something: no session is closed near the end, and some are filled.
    kept = [row for row in drawn[-30:] if row[0] != "close"]
    rows += [*drawn[:-30], ("open",), *kept]
    rows += [("create", name) for name in NAMES]
    rows += [("again", NAMES[0], 77, name, token) for name in NAMES for token in TOKENS]
    rows += [("file", name, File(t, 3000 + t % 7, pos=t % 5)) for name in NAMES for t in TOKENS]
    return rows


def answers_of(rows: list[tuple[object, ...]], said: list[dict[str, str]]) -> list[str]:
    """A guest's answers in the words of :class:`Ours`."""
    out = []
    for words, values in zip(rows, said, strict=True):
        if "error" in values:
            out.append(values["error"])
        elif words[0] == "retrieve":
            numbers = (values["size"], values["pos"], int(values["seals"], 0))
            out.append("ok {} {} {} {}".format(*numbers, int(values["crc32"], 16)))
        elif words[0] == "name":
            out.append(f"ok {values['name'].encode()!r}")
        else:
            out.append("ok")
    return out


@contextlib.contextmanager
def two_kernels(
    before: list[tuple[object, ...]], after: list[tuple[object, ...]]
) -> Iterator[tuple[list[str], list[str]]]:
    """Our answers, before the jump and behind it."""
    machine = virt_machine("512MiB")

    def kernel() -> Kernel:
        return Kernel(
            machine,
            arch="arm64",
            kho_abi="kho-v4",
            cmdline="kho=on liveupdate=on",
            file_handlers=[by_luo.handler_of(0, flbs=True)],
        )

    first = kernel()
    first.boot()
    old = Ours(first)
    for words in before:
        old.do(words)
    first.kexec_load(kernel())
    second = first.kexec()
    assert isinstance(second, Kernel)
    old.end()
    new = Ours(second)
    for words in after:
        new.do(words)
    yield old.answers, new.answers
    new.end()
    second.shutdown()


@pytest.mark.parametrize("seed", range(6))
def test_answers_are_those_of_a_real_kernel(build: Build, seed: int) -> None:
    """Random calls, many of them wrong, before and after the jump: errno for errno."""
    before, after = commands(seed, after=False), commands(1000 + seed, after=True)
    scripts = ["\n".join(map(line, before)) + "\n" + next_kernel(2), "\n".join(map(line, after))]
    run = boot(build, scripts, memory=512 * MIB)
    said = [
        [
            r.values
            for r in stage.results
            if r.command not in ("start", "end", "kexec", "kexec-load")
        ]
        for stage in run.stages
    ]
    with two_kernels(before, after) as ours:
        theirs = [
            answers_of(rows, lines) for rows, lines in zip((before, after), said, strict=True)
        ]
        wrong = [
            f"{line(words)}: Linux {a}, luo {b}"
            for rows, one, other in zip((before, after), theirs, ours, strict=True)
            for words, a, b in zip(rows, one, other, strict=True)
            if a != b
        ]

    assert wrong == []
    assert {"ok", "EBUSY", "EEXIST", "ENOENT", "EINVAL", "EBADF"} <= set(ours[0])
    assert {"ENOENT", "EINVAL"} <= set(ours[1])
    assert sum(answer.startswith("ok ") for answer in ours[1]) > 3
