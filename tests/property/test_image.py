"""Images that somebody broke: every reader answers, and the survey misses nothing."""

import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luo.errors import HandoverError
from luo.image import Extent, Image
from luo.image.document import describe
from luo.kho import Handover, Kho
from luo.memory import PhysicalMemory

MIB = 1 << 20
INTERESTING = [0, 1, 0xFFF, 0x1000, 0x2000, 4 * MIB, 1 << 26, 1 << 52, 1 << 63, (1 << 64) - 1]


def handed_over(generation):
    memory = PhysicalMemory(64 * MIB, nodes=2)
    kho = Kho(memory, abi=generation, scratch=[(32 * MIB, 8 * MIB)])
    for order in (0, 1, 9):
        kho.preserve_folio(memory.alloc_folio(order), order)
    if kho.generation.finalize:
        kho.finalize()
    return Image.from_memory(memory, kho.handover(), abi=generation)


@pytest.fixture(scope="module", params=["kho-v4", "kho-v1", "kho-v1-512", "kho-v5-series"])
def image(request):
    return handed_over(request.param)


@given(data=st.data())
def test_survey_of_a_broken_image_answers_and_is_no_laxer_than_a_kernel(image, data):
    """Never an exception; and whatever the strict reader refuses is in the list."""
    pages = {
        extent.phys + at: bytearray(extent.data[at : at + 4096])
        for extent in image.extents
        if extent.data is not None
        for at in range(0, extent.nbytes, 4096)
    }
    numbers = list(image.handover.numbers)
    for _ in range(data.draw(st.integers(1, 6))):
        what = data.draw(st.sampled_from(["byte", "word", "handover", "gone"]))
        phys = data.draw(st.sampled_from(sorted(pages)))
        page = pages[phys]
        if what == "byte":
            used = [at for at in range(4096) if page[at]] or [0]
            page[data.draw(st.sampled_from(used))] ^= 1 << data.draw(st.integers(0, 7))
        elif what == "word":
            value = data.draw(st.sampled_from([*INTERESTING, *pages]))
            struct.pack_into("<Q", page, 8 * data.draw(st.integers(0, 511)), value)
        elif what == "handover":
            numbers[data.draw(st.integers(0, 3))] = data.draw(st.sampled_from(INTERESTING))
        elif len(pages) > 1:
            del pages[phys]
    broken = Image(
        image.ram.ranges,
        Handover(*numbers),
        [Extent(phys, 4096, bytes(page)) for phys, page in pages.items()],
        abi=image.abi,
    )

    json.dumps(describe(broken))
    refused = None
    try:
        broken.incoming()
    except HandoverError as error:
        refused = error
    assert refused is None or broken.survey.violations, f"survey misses: {refused}"


@given(st.binary(max_size=512))
def test_any_bytes_are_a_handover_error(data):
    """Whatever the file is: the offset of what is wrong."""
    with pytest.raises(HandoverError) as caught:
        Image.from_bytes(b"\x89KHOIMG\n\x01\0\0\0" + data)

    assert caught.value.phys is not None
