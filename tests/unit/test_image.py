"""Image files, surveys of wrong images, differences, encoding, conversion."""

import copy
import itertools
import json
import stat
import struct
import zlib

import pytest

from luo import abi
from luo.errors import HandoverError
from luo.fdt import FdtWriter
from luo.image import Extent, Image
from luo.image.convert import convert
from luo.image.diff import compare
from luo.image.document import describe
from luo.image.encode import encode
from luo.kho import Handover, Kho, KhoNode
from luo.memory import PhysicalMemory

MIB = 1 << 20
GENERATIONS = list(abi.GENERATIONS)


def handed_over(generation="kho-v4", page_size=4096):
    """A handover with folios, a range, a hole and a tree called ``blob``."""
    unit = page_size // 4096
    memory = PhysicalMemory(256 * MIB * unit, nodes=2, page_size=page_size)
    scratch = [(192 * MIB * unit, 32 * MIB * unit)]
    kho = Kho(memory, abi=generation, scratch=scratch)
    for order in (0, 0, 3, 9):
        phys = memory.alloc_folio(order)
        memory.view(phys, 16)[:] = b"preserved folio "
        kho.preserve_folio(phys, order)
    kho.preserve_folio(memory.alloc_folio(5), 5)  # never written
    kho.preserve_pages(memory.alloc_pages(7), 7)
    if kho.generation.inline:
        node = KhoNode()
        node.properties["answer"] = struct.pack("<Q", 42)
        node.children["below"] = KhoNode()
        kho.add_node(None, "blob", node)
    else:
        writer = FdtWriter()
        with writer.node(""):
            writer.property_native_u64("answer", 42)
            writer.add_node("below", {})
        kho.save_subtree("blob", writer.finish())
    if kho.generation.finalize:
        kho.finalize()
    return Image.from_memory(memory, kho.handover(), abi=generation)


@pytest.fixture(scope="module")
def image():
    return handed_over()


@pytest.fixture(scope="module")
def document(image, tmp_path_factory):
    path = tmp_path_factory.mktemp("document") / "image"
    image.save(path)
    return json.loads(json.dumps(describe(Image.load(path))))


def rules(image):
    return [str(violation) for violation in image.verify()]


def blocks(image):
    return set(image.survey.iter_blocks())


# ---- files ----


@pytest.mark.parametrize("generation", GENERATIONS)
def test_save_load_gives_the_same_image(generation, tmp_path):
    """Numbers, generation, pages and holes come back; the file is the owner's alone."""
    image = handed_over(generation)
    path = tmp_path / "image"
    nbytes = image.save(path)
    again = Image.load(path)

    assert [] == image.verify()
    assert nbytes == path.stat().st_size
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert (generation, image.handover, image.ram.ranges) == (
        again.abi,
        again.handover,
        again.ram.ranges,
    )
    assert [(e.phys, e.nbytes, e.data) for e in image.extents] == [
        (e.phys, e.nbytes, e.data) for e in again.extents
    ]
    assert [path] == list(tmp_path.iterdir())


@pytest.mark.parametrize("page_size", [16384, 65536])
def test_save_load_of_other_page_sizes(page_size, tmp_path):
    """Page size and shape of the tree are those of the machine."""
    image = handed_over(page_size=page_size)
    image.save(tmp_path / "image")

    assert [] == Image.load(tmp_path / "image").verify()
    assert [] == compare(image, Image.load(tmp_path / "image"))


def test_save_that_fails_leaves_what_was_there(image, tmp_path):
    """A file that cannot be replaced is untouched, and nothing is left beside it."""
    (tmp_path / "image").mkdir()
    with pytest.raises(OSError, match="directory"):
        image.save(tmp_path / "image")

    assert ["image"] == [path.name for path in tmp_path.iterdir()]


def test_hole_reads_as_zero_and_has_no_pages_in_the_file(image):
    """A preserved folio that was never written is an extent without data."""
    hole = max((e for e in image.extents if e.data is None), key=lambda e: e.nbytes)

    assert hole.nbytes >= 32 * 4096
    assert bytes(4096) == image.read(hole.phys, 4096)
    assert not image.memory().is_populated(hole.phys, 4096)


@pytest.fixture(scope="module")
def raw(image, tmp_path_factory):
    path = tmp_path_factory.mktemp("raw") / "image"
    image.save(path)
    return path.read_bytes()


def sealed(raw):
    """The same bytes with the checksum that they should have."""
    raw = bytearray(raw)
    ranges, extents = struct.unpack_from("<QQ", raw, 88)
    raw[12:16] = bytes(4)
    end = 128 + 24 * min(ranges + extents, len(raw))
    raw[12:16] = struct.pack("<I", zlib.crc32(raw[:end]))
    return bytes(raw)


def test_file_cut_short_is_refused_at_every_boundary(raw):
    """A truncated file is a HandoverError, wherever it was cut."""
    boundaries = {0, 1, 7, 8, 12, 16, 48, 56, 88, 96, 104, 112, 127, 128, 129, 152, 176, 4096}
    for length in sorted(boundaries | {len(raw) - 4096, len(raw) - 1}):
        with pytest.raises(HandoverError):
            Image.from_bytes(raw[:length])


def test_file_with_a_flipped_bit_in_head_or_tables_is_refused(raw):
    """Every bit of head and tables counts."""
    ranges, extents = struct.unpack_from("<QQ", raw, 88)
    for at in range(128 + 24 * (ranges + extents)):
        wrong = bytearray(raw)
        wrong[at] ^= 1 << at % 8
        with pytest.raises(HandoverError):
            Image.from_bytes(bytes(wrong))


@pytest.mark.parametrize(
    ("offset", "value", "rule"),
    [
        (48, 0, "page size"),
        (48, 8192, "page size"),
        (88, 0, "ranges"),
        (88, 1 << 63, "ranges"),
        (96, 1 << 60, "extents"),
        (104, 1, "bytes"),
        (112, 1, "flags"),
        (120, 1, "end of its head"),
        (128, 1, "whole pages"),
        (136, 1 << 63, "too high"),
        (144, 1 << 40, "node"),
    ],
)
def test_file_with_a_wrong_number_is_refused(raw, offset, value, rule):
    """Numbers of the head are checked before they are used, checksum or not."""
    wrong = bytearray(raw)
    struct.pack_into("<Q", wrong, offset, value)

    with pytest.raises(HandoverError, match=rule):
        Image.from_bytes(sealed(wrong))


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        (0, 1, "whole pages"),
        (0, 1 << 62, "not in RAM"),
        (8, 0, "whole pages"),
        (8, 1 << 62, "not in RAM"),
        (16, 1 << 62, "has its pages at"),
    ],
)
def test_file_with_a_wrong_extent_is_refused(raw, field, value, rule):
    """An extent must be pages in RAM, in order, with its bytes where they belong."""
    wrong = bytearray(raw)
    (ranges,) = struct.unpack_from("<Q", raw, 88)
    struct.pack_into("<Q", wrong, 128 + 24 * ranges + field, value)

    with pytest.raises(HandoverError, match=rule):
        Image.from_bytes(sealed(wrong))


def test_file_with_overlapping_extents_is_refused(raw):
    """Two extents that hold the same page, or are out of order."""
    wrong = bytearray(raw)
    (ranges,) = struct.unpack_from("<Q", raw, 88)
    at = 128 + 24 * ranges
    wrong[at + 24 : at + 32] = raw[at : at + 8]

    with pytest.raises(HandoverError, match="overlaps"):
        Image.from_bytes(sealed(wrong))


# ---- wrong images: every violation ----


def edited(document, edit):
    changed = copy.deepcopy(document)
    edit(changed)
    return encode(changed)


def test_verify_names_every_violation(document):
    """Not only the first: each with its part, address and rule."""

    def edit(d):
        d["map"]["blocks"] += [["0x20000000", 0], ["0xc000000", 1], ["0x40000000", 0]]
        d["map"]["illegal_keys"].append(["0x20000000000000", "0x0"])
        for name, value in d["root"]["nodes"][0]["properties"]:
            if name == "compatible":
                value["strings"] = ["kho-v9"]

    found = rules(edited(document, edit))

    assert any("0x20000000: preserved block of order 0 is not in RAM" in rule for rule in found)
    assert any("0x40000000: preserved block of order 0 is not in RAM" in rule for rule in found)
    assert any("0xc000000: preserved block of order 1 overlaps scratch" in rule for rule in found)
    assert any("key 0x20000000000000 stands for no block" in rule for rule in found)
    assert any("kho-v9" in rule for rule in found)


@pytest.mark.parametrize(
    ("edit", "rule"),
    [
        (lambda d: d["handover"].update(fdt_phys="0x10"), "misaligned"),
        (lambda d: d["handover"].update(fdt_phys="0x4000000000"), "not in RAM"),
        (lambda d: d["handover"].update(fdt_len=8192), "not a page"),
        (lambda d: d["handover"].update(scratch_len=15), "scratch array"),
        (lambda d: d["handover"].update(scratch_phys="0x9"), "scratch array is misaligned"),
        (lambda d: d["scratch"]["areas"][0].__setitem__(0, "0xc000001"), "not whole pages"),
        (lambda d: d["scratch"]["areas"][0].__setitem__(1, 1 << 40), "not in RAM"),
        (lambda d: d["map"].update(phys="0x3"), "misaligned or not in RAM"),
        (lambda d: d["map"].update(phys="0x0"), "is 0"),
        (lambda d: d["map"].update(phys="0xd000000"), "lies in scratch"),
        (lambda d: d["subtrees"][0].update(phys="0x7000000"), "never written|not kept"),
        (lambda d: d["subtrees"][0].update(nbytes=1 << 40), "not in RAM"),
        (lambda d: d["subtrees"][-1].update(nbytes=72), "73 are needed"),
        (lambda d: d["subtrees"][-1]["decoded"].update(version=2), "version 2"),
        (lambda d: d["root"]["nodes"][1]["properties"].pop(), "is missing"),
        (
            lambda d: d["root"]["nodes"][2].update(name=d["root"]["nodes"][1]["name"]),
            "stands twice",
        ),
    ],
)
def test_verify_of_an_edited_image(document, edit, rule):
    """Whatever is made wrong is named, and the strict reader refuses what a kernel would."""
    import re

    found = rules(edited(document, edit))

    assert any(re.search(rule, line) for line in found), found


def test_verify_notes_node_reached_twice_and_cycle(image):
    """A tree that runs into itself is followed once."""
    root = image.survey.map_phys
    page = bytearray(image.read(root, 4096))
    slot = next(i for i in range(512) if page[8 * i : 8 * i + 8] != bytes(8))
    struct.pack_into("<QQ", page, 8 * slot + 8, root, root)
    wrong = rules(replaced(image, root, bytes(page)))

    assert any("reached twice" in rule for rule in wrong)


def test_verify_notes_chunks_in_a_circle():
    """A list of chunks that runs in a circle ends."""
    image = handed_over("kho-v1")
    last = [page for page in image.survey.map_pages if page.kind == "chunk"][-1].phys
    page = struct.pack("<Q", image.survey.map_phys) + image.read(last, 4096)[8:]

    assert any("circle" in rule for rule in rules(replaced(image, last, page)))


def replaced(image, phys, page):
    """The same image with another page at *phys*."""
    extents = []
    for extent in image.extents:
        if extent.phys <= phys < extent.end and extent.data is not None:
            data = bytearray(extent.data)
            data[phys - extent.phys : phys - extent.phys + len(page)] = page
            extent = Extent(extent.phys, extent.nbytes, bytes(data))
        extents.append(extent)
    return Image(
        image.ram.ranges, image.handover, extents, abi=image.abi, page_size=image.page_size
    )


# ---- documents ----


@pytest.mark.parametrize("generation", GENERATIONS)
def test_encode_of_an_unedited_document_gives_the_same_bytes(generation):
    """What inspect prints is complete."""
    image = handed_over(generation)
    again = encode(json.loads(json.dumps(describe(image))), source=image)

    assert image.handover == again.handover
    assert [(e.phys, e.nbytes) for e in image.extents if e.data is None] == [
        (e.phys, e.nbytes) for e in again.extents if e.data is None
    ]
    for extent in image.extents:
        assert image.read(extent.phys, extent.nbytes) == again.read(extent.phys, extent.nbytes)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_encode_of_another_map_writes_that_map(generation):
    """Blocks added and taken away are what the new image preserves."""
    image = handed_over(generation)
    document = json.loads(json.dumps(describe(image)))
    gone = document["map"]["blocks"].pop(0)
    document["map"]["blocks"].append(["0x7e00000", 9])
    again = encode(document, source=image)

    expected = blocks(image) - {(int(gone[0], 16), gone[1])} | {(0x7E00000, 9)}
    assert expected == blocks(again)


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        [],
        {},
        {"format": "luo-image", "version": 2},
        {"format": "luo-image", "version": 1, "abi": "kho-v4"},
        {"format": "luo-image", "version": 1, "abi": "kho-v4", "page_size": 4096, "memory": 3},
    ],
)
def test_encode_of_something_else_is_a_value_error(wrong):
    """A document that is none is refused, saying so."""
    with pytest.raises(ValueError, match="document"):
        encode(wrong)


# ---- differences ----


def test_compare_of_other_preserved_memory(image, document):
    """Pages that only one preserves are named."""
    other = edited(document, lambda d: d["map"]["blocks"].append(["0x7e00000", 0]))

    assert [("pages", "only in B", None, ["0x7e00000", 4096])] == [
        (d.part, d.what, d.a, d.b) for d in compare(image, other)
    ]


def test_compare_of_the_same_pages_in_other_blocks_is_equal(document):
    """How the same memory is cut into blocks makes no difference."""
    two = edited(
        document, lambda d: d["map"]["blocks"].extend([["0x7e00000", 0], ["0x7e01000", 0]])
    )
    one = edited(document, lambda d: d["map"]["blocks"].append(["0x7e00000", 1]))

    assert [] == compare(one, two)


def test_compare_of_other_contents_and_metadata(image, document):
    """A flipped byte in a preserved page, and another release."""
    phys = next(p for p, order in image.survey.iter_blocks() if order == 9)
    other = replaced(image, phys, b"x")
    assert [("contents", [hex(phys), 4096])] == [(d.part, d.a) for d in compare(image, other)]

    other = edited(document, lambda d: d["subtrees"][-1]["decoded"].update(previous_release="9"))
    assert [("kexec-metadata", "previous_release", "luo", "9")] == [
        (d.part, d.what, d.a, d.b) for d in compare(image, other)
    ]


# ---- conversion ----


@pytest.fixture(scope="module")
def of_each():
    return {generation: handed_over(generation) for generation in GENERATIONS}


@pytest.mark.parametrize(("start", "target"), list(itertools.permutations(GENERATIONS, 2)))
def test_convert_there_and_back_preserves_the_same_blocks(of_each, start, target):
    """For each pair: nothing breaks a rule, every block and its contents are there again."""
    image = of_each[start]
    there = convert(image, target)
    back = convert(there, start)

    assert [] == there.verify()
    assert [] == back.verify()
    assert blocks(image) == blocks(back)
    parts = {(d.part, d.what) for d in compare(image, back)}
    assert parts <= {("kexec-metadata", "previous_release")}


def test_convert_keeps_every_other_block(of_each):
    """There, what is preserved is the same but for root tree and metadata."""
    image = of_each["kho-v4"]
    metadata = next(s.phys for s in image.survey.subtrees if s.name == "kexec-metadata")
    own = {(image.handover.fdt_phys, 0), (metadata, 0)}

    assert blocks(image) - own == blocks(convert(image, "kho-v5-series"))
    assert blocks(image) - {(metadata, 0)} == blocks(convert(image, "kho-v1-512"))


def test_convert_of_a_wrong_image_is_refused(document):
    """What breaks a rule is not converted: the rule is named."""
    wrong = edited(document, lambda d: d["map"]["blocks"].append(["0x40000000", 0]))

    with pytest.raises(HandoverError, match="not in RAM"):
        convert(wrong, "kho-v1")


def test_convert_names_what_cannot_be_expressed():
    """A blob that is no tree has a size that only later generations note."""
    memory = PhysicalMemory(64 * MIB)
    kho = Kho(memory, scratch=[(32 * MIB, 8 * MIB)])
    kho.save_subtree("raw", b"no tree")
    image = Image.from_memory(memory, kho.handover())

    with pytest.raises(ValueError, match=r"raw .7 bytes that are no tree"):
        convert(image, "kho-v2")
    with pytest.raises(ValueError, match="no such subtree"):
        convert(image, "kho-v2", drop=["row"])
    dropped = convert(image, "kho-v2", drop=["raw"])
    assert [] == dropped.survey.subtrees
    (phys,) = {s.phys for s in image.survey.subtrees if s.name == "raw"}
    assert (phys, 0) in blocks(dropped)


def test_image_of_a_handover_to_nowhere():
    """A handover that names no tree gives an image that says so, not an exception."""
    image = Image.from_memory(PhysicalMemory(16 * MIB), Handover(4096, 4096, 0, 0))

    assert ["root: 0x1000: root tree was never written"] == rules(image)
