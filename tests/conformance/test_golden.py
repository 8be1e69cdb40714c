"""What a real Linux 7.3 kernel handed over, read by the walker."""

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kho_walker
import pytest

from luo.fdt import Fdt
from luo.kho import Handover, Incoming, Kho
from luo.memory import PhysicalMemory


@dataclass
class Dump:
    """The golden dump: pages of guest memory, and what is known to be true of them."""

    folder: Path
    manifest: dict[str, Any]
    pages: dict[int, bytes]

    def read(self, phys: int, nbytes: int) -> bytes:
        """Guest memory; a page that was not kept raises with its address."""
        parts: list[bytes] = []
        while nbytes:
            start = phys % 4096
            page = self.pages.get(phys - start)
            if page is None:
                raise kho_walker.Broken("page is not in the dump", phys - start)
            parts.append(page[start : start + nbytes])
            phys, nbytes = phys + len(parts[-1]), nbytes - len(parts[-1])
        return b"".join(parts)


@pytest.fixture(scope="module")
def dump(shared: Path) -> Dump:
    folder = shared / "golden" / "kho_v4_arm64"
    contents = (folder / "pages.bin").read_bytes()
    kept = json.loads((folder / "pages.json").read_text())["pages"]
    pages = {int(at, 16): contents[i * 4096 :][:4096] for i, at in enumerate(kept)}
    return Dump(folder, json.loads((folder / "manifest.json").read_text()), pages)


@pytest.fixture(scope="module")
def image(dump: Dump) -> kho_walker.Image:
    four = kho_walker.from_chosen((dump.folder / "kexec.dtb").read_bytes())
    return kho_walker.read_handover(dump.read, *four)


def test_from_chosen_of_the_kernels_device_tree_gives_the_handover(dump):
    """/chosen of the second kernel's device tree names the root tree and the scratch array."""
    handoff = dump.manifest["handoff"]
    four = kho_walker.from_chosen((dump.folder / "kexec.dtb").read_bytes())

    assert (*handoff["kho_fdt"], *handoff["kho_scratch"]) == four


def test_walk_of_the_kernels_tree_gives_exactly_its_preserved_blocks(dump, image):
    """Every (address, order) that the kernel preserved is found, once, and nothing else."""
    expected = sorted((int(phys, 16), order) for phys, order, _ in dump.manifest["preserved"])

    assert expected == sorted(image.preserved)


def test_walk_of_the_kernels_tree_is_in_key_order(dump, image):
    """The walk gives the keys ascending: larger orders first, order 0 last."""
    expected = [int(key, 16) for key in dump.manifest["radix_keys"]]

    assert expected == [kho_walker.encode_key(*block) for block in image.preserved]


def test_walk_of_the_kernels_tree_visits_its_node_pages(dump, image):
    """Each page of the tree is found with its level and key prefix."""
    expected = [
        (node["level"], int(node["pa"], 16), int(node["key_prefix"], 16))
        for node in dump.manifest["radix"]["nodes"]
    ]

    assert sorted(expected) == sorted((n.level, n.phys, n.prefix) for n in image.nodes)
    assert dump.manifest["radix"]["depth"] == kho_walker.geometry(12)[2] + 1


def test_root_tree_of_the_kernel_names_its_subtrees(dump, image):
    """Subtrees in file order, with address, size and content of each blob."""
    root = dump.manifest["root_fdt"]
    expected = [
        (name, (int(child["preserved-data"], 16), child["blob-size"]))
        for name, child in root["subnodes"].items()
    ]

    assert expected == list(image.subtrees.items())
    for name, child in root["subnodes"].items():
        blob = dump.read(*image.subtrees[name])

        assert child["sha256"] == hashlib.sha256(blob).hexdigest()
        assert (dump.folder / child["file"]).read_bytes() == blob


def test_scratch_array_of_the_kernel_holds_its_areas(dump, image):
    """Three areas, one of them empty."""
    expected = [(int(a["addr"], 16), int(a["size"], 16)) for a in dump.manifest["scratch"]]

    assert expected == image.scratch


def test_kexec_metadata_of_the_kernel_is_read(dump, image):
    """Version, release and count of the kexec-metadata blob."""
    metadata = dump.manifest["kexec_metadata"]
    blob = dump.read(*image.subtrees["kexec-metadata"])

    assert tuple(metadata.values()) == kho_walker.read_metadata(blob)


def test_reserved_region_of_the_kernel_is_preserved(dump, image):
    """The memblock subtree describes the region, and its pages are preserved."""
    tree = kho_walker.parse_fdt(dump.read(*image.subtrees["memblock"]))
    expected = dump.manifest["reserve_mem"]["golden"]
    region = tree.children["golden"].properties

    assert tree.properties["compatible"] == b"memblock-v1\0"
    assert region["compatible"] == b"reserve-mem-v1\0"
    assert int(expected["start"], 16) == kho_walker.u64(region["start"])
    assert int(expected["size"], 16) == kho_walker.u64(region["size"])
    pages = {phys + i * 4096 for phys, order in image.preserved for i in range(1 << order)}
    start, size = kho_walker.u64(region["start"]), kho_walker.u64(region["size"])

    assert pages.issuperset(range(start, start + size, 4096))


def test_vmalloc_area_of_the_kernels_test_lists_its_folios(dump, image):
    """kho_test keeps phys | order of its folios in a preserved vmalloc area."""
    expected = dump.manifest["kho_test"]
    data = kho_walker.parse_fdt(dump.read(*image.subtrees["kho_test"])).children["data"]
    chunks, entries = kho_walker.read_vmalloc(dump.read, data.properties["folios_info"])
    words = struct.iter_unpack("<Q", dump.read(entries[0], 8 * expected["nr_folios"]))

    assert expected["vmalloc"]["pages"] == entries
    assert expected["vmalloc"]["chunks"] == len(chunks)
    assert [(int(p, 16), o) for p, o in expected["folios"]] == [
        (word & ~0xFFF, word & 0xFFF) for (word,) in words
    ]


def test_blocks_of_the_kernel_list_its_sessions_and_files(dump, image):
    """LUO's sessions and files stand in chains of serialization blocks of 80 and 64 bytes."""
    compatible, _, sessions_at, flbs_at = struct.unpack("<8s3Q", dump.read(*image.subtrees["LUO"]))
    pages, sessions = kho_walker.read_blocks(dump.read, sessions_at, 80)

    assert dump.manifest["luo"]["compatible"].encode() == compatible.rstrip(b"\0")
    assert len(dump.manifest["luo"]["flbs"]) == kho_walker.u64(dump.read(flbs_at, 16), 8)
    assert all((page, 0) in image.preserved for page in pages)
    assert len(dump.manifest["sessions"]) == len(sessions)
    for expected, session in zip(dump.manifest["sessions"], sessions, strict=True):
        name, files_at, count = struct.unpack("<64s2Q", session)
        _, files = kho_walker.read_blocks(dump.read, files_at, 64)

        assert expected["name"].encode() == name.rstrip(b"\0")
        assert expected["count"] == count == len(files)
        assert [(int(f["data_pa"], 16), int(f["token"], 16)) for f in expected["files"]] == [
            struct.unpack_from("<2Q", file, 48) for file in files
        ]


def test_check_image_of_the_kernel_finds_nothing_wrong(dump, image):
    """What a real kernel writes obeys every rule that the walker checks."""
    machine = dump.manifest["machine"]
    kho_walker.check_image(image, [(int(machine["ram_base"], 16), int(machine["ram_size"], 16))])


def test_read_of_a_page_outside_the_dump_names_its_address(dump):
    """A page that was not kept is an error with its address, never zeros."""
    missing = next(at for at in range(0x40000000, 0x60000000, 4096) if at not in dump.pages)
    before = missing - 4096 if missing - 4096 in dump.pages else max(dump.pages)

    with pytest.raises(kho_walker.Broken) as error:
        dump.read(missing, 8)

    assert missing == error.value.phys
    with pytest.raises(kho_walker.Broken):
        dump.read(before, 4096 + 8)


def test_walk_without_a_node_page_names_its_address(dump, image):
    """A tree whose page is missing from the dump stops at that page."""
    victim = next(node.phys for node in image.nodes if node.level == 0)
    holed = Dump(dump.folder, dump.manifest, {k: v for k, v in dump.pages.items() if k != victim})

    with pytest.raises(kho_walker.Broken) as error:
        list(kho_walker.walk_keys(holed.read, image.nodes[0].phys, 12, []))

    assert victim == error.value.phys


# ---- luo as the second kernel ----


def second_machine(dump: Dump) -> tuple[PhysicalMemory, Handover]:
    """The guest's memory as far as it was kept, and what the first kernel handed over."""
    machine, handoff = dump.manifest["machine"], dump.manifest["handoff"]
    ram = (int(machine["ram_base"], 16), int(machine["ram_size"], 16), 0)
    memory = PhysicalMemory(ranges=[ram])
    for phys, page in dump.pages.items():
        memory.view(phys, 4096)[:] = page
    return memory, Handover(*handoff["kho_fdt"], *handoff["kho_scratch"])


def loaded(incoming: Incoming, name: str) -> bytes:
    """A subtree's blob."""
    return bytes(incoming.load_subtree(name))


def test_handover_from_the_kernels_device_tree_is_luos(dump):
    """luo finds the same four numbers in /chosen."""
    _, handover = second_machine(dump)

    tree = Fdt((dump.folder / "kexec.dtb").read_bytes())

    assert handover == Handover.from_chosen(tree.node("/chosen").properties)


def test_validate_of_the_kernels_handover_accepts_it(dump, image):
    """luo accepts what a real kernel wrote, and counts what is in it."""
    incoming = Kho.validate(*second_machine(dump))

    assert len(dump.manifest["preserved"]) == incoming.nr_preserved
    assert len(image.nodes) == incoming.tree_pages
    for name, child in dump.manifest["root_fdt"]["subnodes"].items():
        expected = (int(child["preserved-data"], 16), child["blob-size"])

        assert expected == incoming.retrieve_subtree(name)
        assert (dump.folder / child["file"]).read_bytes() == loaded(incoming, name)


def test_boot_from_the_kernels_handover_restores_every_folio(dump):
    """A kernel of luo that boots after a real one gets each folio back, with its order."""
    memory, handover = second_machine(dump)
    kho = Kho.boot(memory, handover)
    expected = [(int(at, 16), order) for at, order, owner in dump.manifest["preserved"]]

    assert [order for _, order in expected] == [
        kho.incoming.restore_folio(phys) for phys, _ in expected
    ]


def test_boot_from_the_kernels_handover_raises_the_count(dump):
    """The kexec-metadata of the next handover carries the incoming count plus one."""
    memory, handover = second_machine(dump)
    following = Kho.boot(memory, handover).handover()
    _, subtrees = kho_walker.read_root(
        lambda phys, nbytes: bytes(memory.view(phys, nbytes)), following.fdt_phys, 4096
    )
    blob = bytes(memory.view(*subtrees["kexec-metadata"]))

    assert dump.manifest["kexec_metadata"]["kexec_count"] + 1 == kho_walker.read_metadata(blob)[2]


def test_read_blocks_of_the_kernels_sessions_is_the_walkers(dump):
    """luo reads chains of serialization blocks that a real kernel wrote."""
    incoming = Kho.validate(*second_machine(dump))
    sessions_at = int(dump.manifest["luo"]["sessions_pa"], 16)
    _, expected = kho_walker.read_blocks(dump.read, sessions_at, 80)

    assert expected == [row.tobytes() for row in incoming.read_blocks(sessions_at, 80)]


@pytest.mark.parametrize("name", ["root.fdt", "sub_memblock.bin", "sub_kho_test.bin", "kexec.dtb"])
def test_to_dts_of_the_kernels_trees_is_what_dtc_gives(dump, name):
    """luo's text of a tree is dtc's, up to white space."""
    path = dump.folder / name
    text = path.with_suffix(".dts").read_text().replace("\\0", '", "')  # as newer dtc has it

    assert text.split() == Fdt(path.read_bytes()).to_dts().split()
