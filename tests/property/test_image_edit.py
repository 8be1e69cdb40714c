"""Random changes of a handover against a plain dictionary of what is in its sessions."""

import tempfile
from pathlib import Path

import kho_walker
from guest_memory import MIB, Guest, write_raw
from hypothesis import given
from hypothesis import strategies as st

from luo.image import Image
from luo.image.edit import NewFile, edit
from luo.image.retrieve import file_bound_data, read_file, sessions

NAMES = st.sampled_from(["a", "b", "c d", "e/f", "%41", "\udcff"])
TOKENS = st.sampled_from([0, 1, 2, (1 << 64) - 1])


def start() -> Image:
    """Two sessions with three memfds and a file of an unknown handler; FLBs of all and of some."""
    made = Guest(size=32 * MIB)
    made.scratch = [(made.base + 16 * MIB, 4 * MIB), (made.base + 24 * MIB, 0)]
    made.folios = made.base + 4 * MIB
    made.add(b"a", 0, b"zero" * 3000, pos=3)
    made.add(b"a", 1, b"one", seals=4)
    made.add(b"b", 0, b"large" * 9000, order=3)
    made.sessions[b"b"].append((2, b"other", 77))
    made.flbs = [(b"all", 1, 4), (b"memfds", 2, 3)]
    pages = made.finish()
    pages[made.base + 20 * MIB] = made.device_tree()
    with tempfile.TemporaryDirectory() as name:
        return Image.load(write_raw(Path(name) / "raw", pages, made.base, made.size))


START = start()
Value = tuple[int, int, bytes] | int


def contents(image: Image) -> dict[str, dict[int, Value]]:
    return {
        s.name: {
            f.token: (f.pos, f.seals, read_file(image, f)) if f.known else f.data for f in s.files
        }
        for s in sessions(image)
    }


changes = st.one_of(
    st.tuples(st.just("drop"), NAMES),
    st.tuples(st.just("drop-file"), NAMES, TOKENS),
    st.tuples(st.just("rename"), NAMES, NAMES),
    st.tuples(
        st.just("add"),
        NAMES,
        TOKENS,
        st.binary(max_size=64).map(lambda data: data * 200),
        st.integers(0, (1 << 64) - 1),
        st.integers(0, 0x3F),
        st.integers(0, 3),
    ),
    st.tuples(st.just("move")),
)


def model(state: dict[str, dict[int, Value]], change) -> dict[str, object] | None:
    """Apply *change* to *state*; the arguments of ``edit``, or None if it must be refused."""
    match change:
        case ("drop", name):
            return {"drop": [name]} if state.pop(name, None) is not None else None
        case ("drop-file", name, token):
            if state.get(name, {}).pop(token, None) is None:
                return None
            return {"drop": [f"{name}/{token:#x}"]}
        case ("rename", old, new):
            if old not in state or (new in state and new != old):
                return None
            entries = [(new if name == old else name, files) for name, files in state.items()]
            state.clear()
            state.update(entries)
            return {"rename": {old: new}}
        case ("add", name, token, data, pos, seals, order):
            if token in state.get(name, {}):
                return None
            state.setdefault(name, {})[token] = (pos, seals, data)
            return {"add": [NewFile(name, token, data, pos, seals, order)]}
        case _:
            return {"move": True}


@given(st.lists(changes, min_size=1, max_size=5))
def test_changes_one_after_the_other(wanted):
    """Each leaves what the dictionary has, breaks no rule, and preserves nothing for ever."""
    image, state = START, contents(START)
    for change in wanted:
        arguments = model(state, change)
        if arguments is None:
            continue
        image = edit(image, **arguments)

        assert [] == image.verify()
        assert state == contents(image)
        assert list(state) == list(contents(image))
        found = kho_walker.read_handover(image.read, *image.handover.numbers)
        kho_walker.check_image(found, [(start, nbytes) for start, nbytes, _ in image.ram.ranges])
        values = [value for files in state.values() for value in files.values()]
        counts = {flb.name: flb.count for flb in file_bound_data(image)}
        if "all" in counts:
            assert len(values) == counts["all"]
    everything = edit(image, drop=list(state))
    # root tree, metadata, LUO's blob and its page of FLBs
    assert 4 == len(everything.survey.phys)
