"""What a real Linux 7.3 kernel handed over, as an image: exactly what its manifest says."""

import json
from pathlib import Path
from typing import Any

import pytest

from luo.errors import HandoverError
from luo.image import Image
from luo.image.convert import convert
from luo.image.diff import compare
from luo.image.document import describe
from luo.image.encode import encode


@pytest.fixture(scope="module")
def folder(shared: Path) -> Path:
    return shared / "golden" / "kho_v4_arm64"


@pytest.fixture(scope="module")
def image(folder: Path) -> Image:
    return Image.load(folder)


@pytest.fixture(scope="module")
def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def decoded(image: Image, name: str) -> dict[str, Any]:
    return next(s.decoded for s in image.survey.subtrees if s.name == name)


def test_verify_finds_nothing(image):
    """A kernel's own handover breaks no rule and earns no warning."""
    assert [] == image.verify()
    assert [] == image.survey.warnings


def test_handover_and_scratch(image, manifest):
    """Handover and scratch areas are the ones that the kernel was given."""
    handoff = manifest["handoff"]

    assert (*handoff["kho_fdt"], *handoff["kho_scratch"]) == image.handover.numbers
    areas = [(int(a["addr"], 16), int(a["size"], 16)) for a in manifest["scratch"]]
    assert areas == image.survey.scratch


def test_blocks_and_nodes(image, manifest):
    """Every (address, order) and every page of the tree, and nothing else."""
    survey = image.survey
    expected = sorted((int(phys, 16), order) for phys, order, _ in manifest["preserved"])

    assert expected == sorted(survey.iter_blocks())
    nodes = {
        (n["level"], int(n["pa"], 16), int(n["key_prefix"], 16)) for n in manifest["radix"]["nodes"]
    }
    assert nodes == {(page.level, page.phys, page.prefix) for page in survey.map_pages}
    assert [] == survey.illegal_keys


def test_subtrees(image, manifest, folder):
    """Each child of the root tree, with its blob."""
    expected = {
        name: (int(node["preserved-data"], 16), node["blob-size"])
        for name, node in manifest["root_fdt"]["subnodes"].items()
    }

    assert expected == {s.name: (s.phys, s.nbytes) for s in image.survey.subtrees}
    for name, (phys, nbytes) in expected.items():
        assert (folder / f"sub_{name}.bin").read_bytes() == image.read(phys, nbytes)


def test_metadata_and_regions(image, manifest):
    """kexec-metadata and the reserve_mem region."""
    found = decoded(image, "kexec-metadata")
    expected = manifest["kexec_metadata"]
    assert expected == {name: found[name] for name in expected}

    regions = decoded(image, "memblock")["regions"]
    assert [
        {"name": name, "start": int(region["start"], 16), "size": int(region["size"], 16)}
        for name, region in manifest["reserve_mem"].items()
    ] == regions


def test_kho_test_folios_have_their_checksum(image, manifest):
    """The test folios, their vmalloc array, and the checksum over their contents."""
    found, expected = decoded(image, "kho_test"), manifest["kho_test"]

    assert [[int(phys, 16), order] for phys, order in expected["folios"]] == found["folios"]
    assert expected["csum"] == found["csum"]
    assert expected["csum"] % 0xFFFF == found["csum_of_folios"]
    assert expected["vmalloc"]["pages"] == found["vmalloc"]["pages"]
    assert expected["vmalloc"]["first"] == found["vmalloc"]["first"]


def test_sessions_and_files(image, manifest):
    """Every session, file, memfd, folio and FLB of the kernel's LUO."""
    found = decoded(image, "LUO")

    assert manifest["luo"]["liveupdate_num"] == found["liveupdate_num"]
    assert manifest["luo"]["flbs"] == [
        {name: flb[name] for name in ("name", "data", "count")} for flb in found["flbs"]["flbs"]
    ]
    for expected, session in zip(manifest["sessions"], found["sessions"], strict=True):
        assert expected["name"] == session["name"]
        assert expected["count"] == session["count"]
        for wanted, file in zip(expected["files"], session["files"], strict=True):
            memfd = file["memfd"]
            assert int(wanted["token"], 16) == file["token"]
            assert int(wanted["data_pa"], 16) == file["data"]
            assert [wanted[n] for n in ("size", "pos", "seals", "flags", "nr_folios")] == [
                memfd[n] for n in ("size", "pos", "seals", "flags", "nr_folios")
            ]
            assert wanted["folios_pfn_flags_index_order"] == memfd["folios"]


def test_page_that_was_not_kept_is_named(image):
    """Reading a page that the dump has not says so, with its address."""
    with pytest.raises(HandoverError, match="not kept") as caught:
        image.read(0x405D0800, 16)

    assert caught.value.phys == 0x405D0000


def test_next_kernel_takes_it_over(image, manifest):
    """What the strict reader finds is what the survey found."""
    incoming = image.incoming()

    assert len(manifest["preserved"]) == incoming.nr_preserved
    assert incoming.metadata is not None
    assert incoming.metadata.previous_release == "7.3.4"


def test_file_and_document_give_it_back(image, tmp_path):
    """Saved and loaded, or described and encoded, it is the same image."""
    image.save(tmp_path / "golden.img")
    again = Image.load(tmp_path / "golden.img")
    encoded = encode(json.loads(json.dumps(describe(image))))

    for other in (again, encoded):
        assert [] == compare(image, other)
        assert image.handover == other.handover
        assert all(
            image.read(part.phys, part.nbytes) == other.read(part.phys, part.nbytes)
            for part in image.extents
        )


def test_conversion_names_what_the_target_cannot_express(image):
    """LUO's blob is no tree: a generation that notes no sizes cannot have it, unless dropped."""
    with pytest.raises(ValueError, match="kho-v1 cannot express: LUO"):
        convert(image, "kho-v1")

    names = {s.name for s in convert(image, "kho-v1", drop=["LUO"]).survey.subtrees}
    assert names == {"memblock", "kho_test"}


@pytest.mark.parametrize("target", ["kho-v5-series", "kho-v1-512", "kho-v1", "kho-v2", "kho-v3"])
def test_conversion_there_and_back_preserves_the_same(image, target):
    """Nothing but LUO, which is dropped, is lost on the way; no end breaks a rule."""
    there = convert(image, target, drop=["LUO"])
    back = convert(there, "kho-v4")

    assert [] == there.verify()
    assert [] == back.verify()
    parts = {d.part for d in compare(image, back)}
    assert parts <= {"LUO", "kexec-metadata"}
    assert sorted(image.survey.iter_blocks()) == sorted(back.survey.iter_blocks())
