"""What a real Linux 7.3 kernel preserved, given back: every session, file and byte of its manifest.

The same pages are read in every form they can come in: the directory, a raw file of guest memory,
an ELF core; and retrieved through Python and through the command.
"""

import hashlib
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from luo.cli import main
from luo.errors import HandoverError
from luo.image import Image
from luo.image.retrieve import file_bound_data, pieces, read_file, retrieve, select, sessions

RAM = 0x4000_0000


@pytest.fixture(scope="module")
def folder(shared: Path) -> Path:
    return shared / "golden" / "kho_v4_arm64"


@pytest.fixture(scope="module")
def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def put_pages(file, folder, manifest, shift):
    """Lay the dump's pages and the device tree where they were, *shift* lower."""
    contents = (folder / "pages.bin").read_bytes()
    for i, phys in enumerate(json.loads((folder / "pages.json").read_text())["pages"]):
        file.seek(int(phys, 16) - shift)
        file.write(contents[i * 4096 :][:4096])
    file.seek(manifest["handoff"]["kexec_dtb"][0] - shift)
    file.write((folder / "kexec.dtb").read_bytes())


@pytest.fixture(scope="module")
def forms(folder, manifest, tmp_path_factory) -> dict[str, Path]:
    """The dump as a directory, as raw memory and as an ELF core."""
    place = tmp_path_factory.mktemp("golden")
    size = int(manifest["machine"]["ram_size"], 16)
    with (place / "memory.raw").open("wb") as file:
        file.truncate(size)
        put_pages(file, folder, manifest, RAM)
    with (place / "memory.elf").open("wb") as file:
        offset = 64 + 56 + 37  # as QEMU: not a multiple of anything
        file.truncate(offset + size)
        ident = b"\x7fELF\2\1\1" + bytes(9)
        file.write(
            struct.pack("<16sHHIQQQIHHHHHH", ident, 4, 183, 1, 0, 64, 0, 0, 64, 56, 1, 0, 0, 0)
        )
        file.write(struct.pack("<IIQQQQQQ", 1, 0, offset, 0, RAM, size, size, 0))
        put_pages(file, folder, manifest, RAM - offset)
    return {"directory": folder, "raw": place / "memory.raw", "elf": place / "memory.elf"}


@pytest.fixture(scope="module", params=["directory", "raw", "elf"])
def image(request, forms) -> Image:
    return Image.load(forms[request.param])


def stored(wanted: dict[str, Any], page: int) -> bool:
    return wanted["pages_stored"] == "all" or page in wanted["pages_stored"]


def first_missing(wanted: dict[str, Any], kept: set[int]) -> int | None:
    """Address of the first page of a file that the dump has not."""
    for pfn, _, _, order in wanted["folios_pfn_flags_index_order"]:
        for page in range(pfn, pfn + (1 << order)):
            if page * 4096 not in kept:
                return page * 4096
    return None


def test_sessions_tokens_positions_seals_and_counts_equal_the_manifest(image, manifest):
    """Each session and file in order, with all that its records say."""
    found = sessions(image)

    assert [s["name"] for s in manifest["sessions"]] == [s.name for s in found]
    assert [s["count"] for s in manifest["sessions"]] == [s.count for s in found]
    for wanted, session in zip(manifest["sessions"], found, strict=True):
        assert [
            (
                int(f["token"], 16), f["compatible"], int(f["data_pa"], 16), f["size"], f["pos"],
                f["seals"], f["nr_folios"],
            )
            for f in wanted["files"]
        ] == [
            (f.token, f.handler, f.data, f.size, f.pos, f.seals, f.nr_folios)
            for f in session.files
        ]  # fmt: skip
        assert all(f.wrong == () for f in session.files)


def test_flbs_equal_the_manifest(image, manifest):
    """Name, u64 and number of files of each FLB."""
    expected = [(flb["name"], flb["data"], flb["count"]) for flb in manifest["luo"]["flbs"]]

    assert expected == [(f.name, f.data, f.count) for f in file_bound_data(image)]


def test_every_form_is_the_same_handover_and_breaks_no_rule(image, manifest):
    """However the pages come, the kernel's handover is found in them and is whole."""
    handoff = manifest["handoff"]

    assert (*handoff["kho_fdt"], *handoff["kho_scratch"]) == image.handover.numbers
    assert [] == image.verify()
    assert "kho-v4" == image.abi


def test_every_file_whose_pages_are_kept_equals_its_checksum(folder, manifest):
    """crc32 and sha256 of each; the others name the first page that the dump has not."""
    image = Image.load(folder)
    kept = {int(at, 16) for at in json.loads((folder / "pages.json").read_text())["pages"]}
    whole = 0
    for wanted_session, session in zip(manifest["sessions"], sessions(image), strict=True):
        for wanted, file in zip(wanted_session["files"], session.files, strict=True):
            missing = first_missing(wanted, kept)
            if missing is None:
                contents = read_file(image, file)
                assert wanted["crc32"] == f"{zlib.crc32(contents):08x}"
                assert wanted["sha256"] == hashlib.sha256(contents).hexdigest()
                whole += 1
            else:
                with pytest.raises(HandoverError, match="not kept") as caught:
                    read_file(image, file)
                assert missing == caught.value.phys

    assert whole == 6


@pytest.mark.parametrize("form", ["raw", "elf"])
def test_bytes_of_partly_kept_files_follow_the_pattern(forms, manifest, form):
    """In a whole memory, pages that the dump has not are zeros; those it has are the file's."""
    image = Image.load(forms[form])
    checked = 0
    for wanted_session, session in zip(manifest["sessions"], sessions(image), strict=True):
        for wanted, file in zip(wanted_session["files"], session.files, strict=True):
            if wanted["content"] != "pat":
                continue
            contents = read_file(image, file)
            for page in range(-(-wanted["size"] // 4096)):
                part = contents[page * 4096 :][:4096]
                words = ((file.token << 32) + i for i in range(page * 512, page * 512 + 512))
                expected = b"".join(struct.pack("<Q", word & (1 << 64) - 1) for word in words)
                if stored(wanted, page):
                    assert expected[: len(part)] == part
                    checked += 1
                else:
                    assert not any(part)

    assert checked == 19


def test_pieces_ascend_and_stay_in_the_file(forms):
    """The runs of a file are disjoint, ascending and end with it."""
    image = Image.load(forms["raw"])
    for session in sessions(image):
        for file in session.files:
            end = 0
            for at, data in pieces(image, file):
                assert end <= at < at + len(data) <= (file.size or 0)
                end = at + len(data)


def test_retrieve_writes_what_is_kept_and_names_what_is_not(folder, manifest, tmp_path):
    """Files, checksums and a manifest; one error a file, with the address, and exit status 1."""
    output = tmp_path / "out"

    done = CliRunner().invoke(main, ["image", "retrieve", str(folder), "-o", str(output)])

    assert 1 == done.exit_code, done.output
    rows = json.loads((output / "manifest.json").read_text())
    for wanted_session, session in zip(manifest["sessions"], rows["sessions"], strict=True):
        assert wanted_session["name"] == session["name"]
        for wanted, row in zip(wanted_session["files"], session["files"], strict=True):
            assert (wanted["token"], wanted["pos"], wanted["seals"]) == (
                row["token"], row["pos"], row["seals"],
            )  # fmt: skip
            if row["path"] is None:
                assert "page was not kept" in row["error"]
                assert row["error"] in done.output
                assert not (output / session["directory"] / row["token"]).exists()
            else:
                contents = (output / row["path"]).read_bytes()
                assert wanted["sha256"] == row["sha256"]
                assert wanted["sha256"] == hashlib.sha256(contents).hexdigest()
    assert (output / "golden-empty").is_dir()
    assert [flb["count"] for flb in rows["flbs"]] == [11, 11, 11]


def test_retrieve_of_chosen_files_writes_those(forms, tmp_path):
    """A session, or a file of one; exit status 0 if these are whole."""
    output = tmp_path / "out"
    arguments = ["golden-beta/0x7fffffff00000001", "golden-alpha/18", "-o", str(output)]

    done = CliRunner().invoke(main, ["image", "retrieve", str(forms["elf"]), *arguments])

    assert 0 == done.exit_code, done.output
    written = sorted(str(p.relative_to(output)) for p in output.rglob("*") if p.is_file())
    assert ["golden-alpha/0x12", "golden-beta/0x7fffffff00000001", "manifest.json"] == written


def test_select_of_what_is_not_there_is_refused(folder):
    """A session or token that the image has not, or no token at all."""
    found = sessions(Image.load(folder))

    for wanted in ("nobody", "golden-alpha/0x99", "golden-alpha/x", "golden-empty/1"):
        with pytest.raises(ValueError, match=wanted.rpartition("/")[0] or wanted):
            select(found, [wanted])


def test_retrieve_never_writes_the_source(forms, tmp_path):
    """Reading a guest's memory leaves every byte of it as it was."""
    before = (forms["raw"].stat().st_mtime_ns, forms["raw"].stat().st_blocks)

    image = Image.load(forms["raw"])
    retrieve(image, tmp_path / "out")

    assert before == (forms["raw"].stat().st_mtime_ns, forms["raw"].stat().st_blocks)
    with pytest.raises(TypeError):
        image.extents[0].data[0] = 1


def test_inspect_shows_the_sessions(forms):
    """A line for each session and file, within 80 columns."""
    done = CliRunner().invoke(main, ["image", "inspect", str(forms["raw"])], env={"COLUMNS": "80"})

    assert 0 == done.exit_code, done.output
    for text in (
        "golden-alpha",
        "golden-empty",
        "0x7fffffff00000001",
        "3,145,729",
        "(device tree at",
    ):
        assert text in done.output
    assert max(len(line.rstrip()) for line in done.output.splitlines()) <= 80
