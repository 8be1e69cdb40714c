"""A guest's memory that somebody changed: every error is one of ours, and ends in time."""

import contextlib
import shutil
import struct
import tempfile
import time
from pathlib import Path

import pytest
from guest_memory import MIB, PAGE, Guest, write_elf, write_raw
from hypothesis import given
from hypothesis import strategies as st

from luo.cli.image_retrieve import session_table
from luo.errors import HandoverError
from luo.image import Image
from luo.image.document import describe
from luo.image.retrieve import read_file, retrieve, sessions

HEADERS = 64 + 2 * 56
NUMBERS = [
    0, 1, 2, 7, 63, 64, PAGE - 1, PAGE, 1 << 31, (1 << 32) - 1, 1 << 52, (1 << 63) - PAGE, 1 << 63,
    (1 << 64) - 1, (1 << 64) - PAGE,
]  # fmt: skip


def small_guest() -> tuple[Guest, dict[int, bytes]]:
    made = Guest(size=32 * MIB)
    made.scratch = [(made.base + 16 * MIB, 4 * MIB), (made.base + 24 * MIB, 0)]
    made.folios = made.base + 4 * MIB
    made.add(b"one", 1, b"a" * 5000)
    made.add(b"one", 2, b"b" * 40_000, order=4)
    made.add(b"two", 1, b"c")
    made.sessions[b"two"].append((3, b"other-v1", 99))
    made.sessions[b"empty"] = []
    made.flbs = [(b"flb", 1, 3)]
    pages = {phys: bytes(data) for phys, data in made.finish().items()}
    pages[made.base + 20 * MIB] = made.device_tree()
    return made, pages


MADE, PAGES = small_guest()
ADDRESSES = sorted(PAGES)
POINTERS = st.sampled_from([*NUMBERS, *ADDRESSES])


def check(path: Path, **settings: object) -> None:
    """Do all that the commands do; only the errors that they turn into a line may come out."""
    began = time.monotonic()
    out = Path(tempfile.mkdtemp(dir=path.parent))
    try:
        image = Image.load(path, **settings)
        describe(image)
        session_table(image, 16)
        image.verify()
        for session in sessions(image):
            for file in session.files:
                if file.known and (file.size or 0) < 64 * MIB:
                    with contextlib.suppress(HandoverError):
                        assert file.size == len(read_file(image, file))
        done = retrieve(image, out)
        assert all((r.path is None) == (r.error is not None) or not r.file.known for r in done)
        image.save(path.with_suffix(".img"))
    except (HandoverError, ValueError):
        pass
    finally:
        shutil.rmtree(out)
    assert time.monotonic() - began < 30


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("memory")


@given(
    edits=st.lists(
        st.tuples(st.sampled_from(ADDRESSES), st.integers(0, 31) | st.integers(0, 511), POINTERS),
        min_size=1,
        max_size=6,
    ),
    known=st.booleans(),
)
def test_words_that_were_changed_in_memory(place, edits, known):
    """Numbers and addresses in trees, map, scratch array, blocks, records."""
    pages = {phys: bytearray(data) for phys, data in PAGES.items()}
    for phys, word, value in edits:
        at = 8 * word % len(pages[phys])
        pages[phys][at : at + 8] = struct.pack("<Q", value)[: len(pages[phys]) - at]
    path = write_raw(place / "raw", pages, MADE.base, MADE.size)

    check(path, **({"base": MADE.base} if known else {}))


@given(
    edits=st.lists(
        st.tuples(st.sampled_from(ADDRESSES), st.integers(0, PAGE - 1), st.integers(0, 255)),
        min_size=1,
        max_size=8,
    )
)
def test_bytes_that_were_changed_in_an_image(place, edits):
    """The same in an image file, whose head says nothing of the pages' bytes."""
    pages = {phys: bytearray(data) for phys, data in PAGES.items()}
    path = write_raw(place / "whole", pages, MADE.base, MADE.size)
    Image.load(path).save(place / "image")
    data = bytearray((place / "image").read_bytes())
    first = data.index(b"\xd0\x0d\xfe\xed") // PAGE * PAGE
    for phys, offset, value in edits:
        at = first + (ADDRESSES.index(phys) * PAGE + offset) % (len(data) - first)
        data[at] = value
    (place / "image").write_bytes(data)

    check(place / "image")


@given(
    edits=st.lists(
        st.tuples(st.integers(4, HEADERS - 1), st.binary(min_size=1, max_size=8))
        | st.tuples(st.integers(4, HEADERS // 8 - 1).map(lambda n: 8 * n), POINTERS.map(
            lambda value: struct.pack("<Q", value))),
        min_size=1,
        max_size=4,
    )
)  # fmt: skip
def test_headers_that_were_changed_in_an_elf_core(place, edits):
    """Segments that overlap, leave the file, or lie anywhere."""

    def edit(headers):
        for at, raw in edits:
            headers[at : at + len(raw)] = raw[: len(headers) - at]

    half = MADE.size // 2
    segments = [(MADE.base, half, half), (MADE.base + half, half, half)]
    path = write_elf(place / "core", PAGES, segments, edit=edit)

    check(path)


@given(cut=st.integers(0, 32 * MIB // PAGE), odd=st.integers(0, PAGE - 1))
def test_memory_that_ends_early(place, cut, odd):
    """A file that was not written to its end."""
    path = write_raw(place / "cut", PAGES, MADE.base, MADE.size)
    with path.open("r+b") as file:
        file.truncate(cut * PAGE + odd)

    check(path)
    if cut:
        check(path, base=MADE.base)
