"""File-lifecycle-bound data (FLB): one sentence of luo-mainline.md section 4.4 a test."""

import dataclasses
import errno
import struct

import pytest
import session_rig as rig
from rig import errno_of
from session_model import FLBS_MAX, INTERRUPT, Handler, Raises, Thing, answer_data
from session_rig import short, updated

from luo.errors import CallbackError, KernelPanic
from luo.flb import Flb

A = Handler("a-v1", frozenset({"a"}))
B = Handler("b-v1", frozenset({"b"}))
LINKS = [(A, "iommu"), (A, "pci"), (B, "pci")]


@pytest.fixture
def recorder():
    """What callbacks were made."""
    return rig.Recorder()


@pytest.fixture
def kernel(recorder):
    """A kernel whose handler A depends on iommu and pci, B on pci."""
    return rig.booted(recorder, (A, B), LINKS)


def filled(kernel, **sessions):
    """Create sessions with files of the kinds named: ``x="aab"``; returns them."""
    made = []
    with kernel.liveupdate.open() as node:
        for name, kinds in sessions.items():
            session = node.create_session(name)
            for token, kind in enumerate(kinds):
                session.preserve(Thing(kind, (name, token)), token)
            made.append(session)
    return made


def flb_calls(recorder):
    """The callbacks of FLBs alone."""
    return [call for call in short(recorder) if call.count(" ") == 1]


# ---- registration ----


def test_one_is_linked_once_to_a_handler(recorder, kernel):
    register = kernel.liveupdate.register_flb

    assert errno_of(register, recorder.handler(A), recorder.flb("iommu")) == errno.EEXIST
    register(recorder.handler(B), recorder.flb("iommu"))


def test_one_name_is_one_object(recorder, kernel):
    other = rig.Recorder().flb("iommu")

    assert errno_of(kernel.liveupdate.register_flb, recorder.handler(B), other) == errno.EEXIST
    assert errno_of(kernel.liveupdate.register_flb, recorder.handler(A), other) == errno.EEXIST


def test_a_handler_must_be_registered_first(recorder, kernel):
    stranger = recorder.handler(Handler("c-v1", frozenset()))

    assert errno_of(kernel.liveupdate.register_flb, stranger, recorder.flb("pci")) == errno.EINVAL


def test_none_is_registered_when_it_is_off(recorder):
    kernel = rig.booted(recorder, (A,), cmdline="kho=on")
    live = kernel.liveupdate

    assert errno_of(live.register_flb, recorder.handler(A), recorder.flb("pci")) == errno.EOPNOTSUPP
    assert errno_of(live.flb_get_incoming, recorder.flb("pci")) == errno.EOPNOTSUPP
    assert errno_of(live.flb_get_outgoing, recorder.flb("pci")) == errno.EOPNOTSUPP


def test_there_are_63(recorder):
    assert FLBS_MAX == 63
    kernel = rig.booted(recorder, (A, B))
    first, second, live = recorder.handler(A), recorder.handler(B), kernel.liveupdate
    for number in range(63):
        live.register_flb(first, recorder.flb(f"flb{number}"))

    assert errno_of(live.register_flb, second, recorder.flb("more")) == errno.ENOSPC
    assert errno_of(live.register_flb, second, rig.Recorder().flb("flb5")) == errno.ENOSPC
    live.register_flb(second, recorder.flb("flb5"))  # known already
    live.unregister_flb(first, recorder.flb("flb5"))
    assert errno_of(live.register_flb, first, recorder.flb("more")) == errno.ENOSPC
    live.unregister_flb(second, recorder.flb("flb5"))
    live.register_flb(first, recorder.flb("more"))


def test_63_come_over(recorder):
    links = [(A, f"flb{number}") for number in range(63)]
    kernel = rig.booted(recorder, (A,), links)
    filled(kernel, x="a")
    last = updated(kernel, recorder, (A,), links)

    for _, name in links:
        assert last.liveupdate.flb_get_incoming(recorder.flb(name))[1] == name


def test_a_handler_takes_its_links_along(recorder, kernel):
    live = kernel.liveupdate
    live.unregister_handler(recorder.handler(A))
    live.register_handler(recorder.handler(A))
    live.register_flb(recorder.handler(A), rig.Recorder().flb("iommu"))  # the name was free
    filled(kernel, x="b")

    assert flb_calls(recorder) == ["PRESERVE pci"]


@pytest.mark.parametrize("name", ["", "x" * 48, "ü" * 24, "a\0b"])
def test_names_of_1_to_47_bytes(recorder, name):
    with pytest.raises((ValueError, OSError)):
        recorder.flb(name)


def test_all_callbacks_are_required():
    with pytest.raises(TypeError):
        Flb("x", preserve=lambda args: 0)


# ---- outgoing ----


def test_preserved_with_the_first_file_unpreserved_with_the_last(recorder, kernel):
    first, second = filled(kernel, x="ab", y="ba")
    assert flb_calls(recorder) == ["PRESERVE iommu", "PRESERVE pci"]
    recorder.begin()
    first.close()
    assert flb_calls(recorder) == []
    second.close()
    assert flb_calls(recorder) == ["UNPRESERVE pci", "UNPRESERVE iommu"][::-1]


def test_dropped_in_reverse_order_of_registration(recorder, kernel):
    (session,) = filled(kernel, x="a")
    recorder.begin()
    session.close()

    assert short(recorder) == ["UNPRESERVE a-v1 0", "UNPRESERVE pci", "UNPRESERVE iommu"]


def test_unpreserve_gets_data_and_object(recorder, kernel):
    (session,) = filled(kernel, x="b")
    (preserved,) = [call for call in recorder.calls if len(call) == 4]
    recorder.begin()
    session.close()
    (undone,) = [call for call in recorder.calls if len(call) == 4]

    assert undone.data == answer_data(preserved)
    assert undone.obj == ("PRESERVE", "pci", 0)


@pytest.mark.parametrize("how", [-errno.ENODEV, Raises(errno.ENODEV)])
def test_a_second_that_fails_undoes_the_first(recorder, kernel, how):
    (session,) = filled(kernel, x="")
    recorder.begin({2: how})
    with pytest.raises(CallbackError) as caught:
        session.preserve(Thing("a", 1), 1)

    assert short(recorder)[1:] == ["PRESERVE iommu", "PRESERVE pci", "UNPRESERVE iommu"]
    error = caught.value
    assert (error.errno, error.event, error.kind, error.name) == (
        errno.ENODEV,
        "PRESERVE",
        "flb",
        "pci",
    )
    recorder.begin()
    session.preserve(Thing("a", 1), 1)
    assert flb_calls(recorder) == ["PRESERVE iommu", "PRESERVE pci"]


def test_the_object_is_there_while_files_are(recorder, kernel):
    live, flb = kernel.liveupdate, recorder.flb("pci")
    assert errno_of(live.flb_get_outgoing, flb) == errno.ENOENT
    (session,) = filled(kernel, x="b")
    assert live.flb_get_outgoing(flb) == ("PRESERVE", "pci", 0)
    recorder.begin()
    session.close()
    assert flb_calls(recorder) == []
    live.flb_put_outgoing(flb)
    assert flb_calls(recorder) == ["UNPRESERVE pci"]
    assert errno_of(live.flb_get_outgoing, flb) == errno.ENOENT


def page_of(kernel):
    """Have *kernel* jump, and return the FLB page that it hands over."""
    pages = []

    def look(handover):
        head, _ = rig.walked(kernel.memory, handover).subtrees["LUO"]
        read = rig.reader(kernel.memory)
        pages.append(read(struct.unpack("<Q", read(head + 24, 8))[0], 4096))

    kernel.on_handover = look
    kernel.kexec_load(rig.Kernel(kernel.machine, file_handlers=()))
    kernel.kexec()
    return pages[0]


def test_the_page_has_those_with_files_in_order_of_registration(recorder, kernel):
    kernel.liveupdate.register_flb(recorder.handler(B), recorder.flb("third"))
    filled(kernel, x="b", y="bb")
    preserved = {call.name: answer_data(call) for call in recorder.calls if len(call) == 4}
    page = page_of(kernel)

    entries = [
        struct.pack("<48sQQ", name, preserved[name.decode()], 3) for name in (b"pci", b"third")
    ]
    assert page == (struct.pack("<QQ", 1, 2) + b"".join(entries)).ljust(4096, b"\0")


def test_the_page_without_files_is_empty(kernel):
    assert page_of(kernel) == struct.pack("<QQ", 1, 0).ljust(4096, b"\0")


# ---- incoming ----


def arrived(recorder, kernel, links=LINKS, handlers=(A, B), **kwargs):
    """Jump, and return the kernel that came up."""
    last = updated(kernel, recorder, handlers, links, **kwargs)
    recorder.begin()
    return last


def test_retrieved_with_the_first_who_asks(recorder, kernel):
    filled(kernel, x="ab")
    live = arrived(recorder, kernel).liveupdate
    pci = recorder.flb("pci")
    obj = live.flb_get_incoming(pci)

    assert live.flb_get_incoming(pci) is obj
    assert short(recorder) == ["RETRIEVE pci"]
    assert obj == ("RETRIEVE", "pci", recorder.calls[0].data)


def test_finished_with_the_last_file(recorder, kernel):
    filled(kernel, x="ab", y="a")
    live = arrived(recorder, kernel).liveupdate
    for name in ("iommu", "pci"):
        live.flb_get_incoming(recorder.flb(name))
        live.flb_put_incoming(recorder.flb(name))
    with live.open() as node:
        first, second = node.retrieve_session("x"), node.retrieve_session("y")
    recorder.begin()
    second.finish()
    assert flb_calls(recorder) == []
    recorder.begin()
    first.finish()
    assert short(recorder) == ["FINISH b-v1 1", "FINISH a-v1 0", "FINISH pci", "FINISH iommu"]


def test_finished_though_nobody_asked_for_it(recorder, kernel):
    filled(kernel, x="ab")
    live = arrived(recorder, kernel).liveupdate
    with live.open() as node:
        node.retrieve_session("x").finish()

    assert short(recorder) == [
        "FINISH b-v1 1",
        "FINISH a-v1 0",
        "RETRIEVE pci",
        "FINISH pci",
        "RETRIEVE iommu",
        "FINISH iommu",
    ]


def test_a_user_keeps_it_beyond_the_last_file(recorder, kernel):
    filled(kernel, x="b")
    live = arrived(recorder, kernel).liveupdate
    pci = recorder.flb("pci")
    obj = live.flb_get_incoming(pci)
    with live.open() as node:
        node.retrieve_session("x").finish()
    assert "FINISH pci" not in flb_calls(recorder)
    assert live.flb_get_incoming(pci) is obj
    live.flb_put_incoming(pci)
    live.flb_put_incoming(pci)
    assert flb_calls(recorder)[-1] == "FINISH pci"
    assert recorder.calls[-1].obj is obj


def test_it_is_gone_after_finish(recorder, kernel):
    filled(kernel, x="b")
    live = arrived(recorder, kernel).liveupdate
    with live.open() as node:
        node.retrieve_session("x").finish()

    assert errno_of(live.flb_get_incoming, recorder.flb("pci")) == errno.ENODATA


def test_nothing_came_over(recorder, kernel):
    assert errno_of(kernel.liveupdate.flb_get_incoming, recorder.flb("pci")) == errno.ENODATA


def test_this_one_did_not_come_over(recorder, kernel):
    filled(kernel, x="b")
    live = arrived(recorder, kernel).liveupdate

    assert errno_of(live.flb_get_incoming, recorder.flb("iommu")) == errno.ENOENT


@pytest.mark.parametrize(
    ("how", "code"), [(-errno.ENOMEM, errno.ENOMEM), (Raises(None), errno.EIO)]
)
def test_a_failed_retrieve_is_remembered(recorder, kernel, how, code):
    filled(kernel, x="b")
    live = arrived(recorder, kernel).liveupdate
    recorder.begin({0: how})

    pci = recorder.flb("pci")
    assert [errno_of(live.flb_get_incoming, pci) for _ in range(3)] == [code] * 3
    with live.open() as node:
        node.retrieve_session("x").finish()
    assert short(recorder) == ["RETRIEVE pci", "FINISH b-v1 0"]


def test_a_link_that_the_kernel_before_had_not(recorder, kernel):
    filled(kernel, x="b")
    live = arrived(recorder, kernel, [*LINKS, (B, "new")]).liveupdate
    with live.open() as node:
        node.retrieve_session("x").finish()

    assert short(recorder) == ["FINISH b-v1 0", "RETRIEVE pci", "FINISH pci"]


def test_outgoing_and_incoming_are_two_things(recorder, kernel):
    filled(kernel, x="b")
    live = arrived(recorder, kernel).liveupdate
    pci = recorder.flb("pci")
    came = live.flb_get_incoming(pci)
    with live.open() as node:
        node.create_session("y").preserve(Thing("b", 9), 0)

    assert live.flb_get_outgoing(pci) != came
    assert live.flb_get_incoming(pci) is came


def test_the_page_is_free_in_the_next_kernel(recorder, kernel):
    """7.3 never frees it there."""
    _, beside = rig.beside()
    filled(kernel, x="ab")
    for _ in range(3):
        kernel = arrived(recorder, kernel)
        with kernel.liveupdate.open() as node:
            if kernel.liveupdate.incoming:
                node.retrieve_session("x").close()
        assert kernel.kho.incoming.nr_unrestored == beside


# ---- a fault of 7.3, and one that is not repeated ----


def test_7_3_does_not_finish_what_nobody_asked_for(recorder, kernel):
    filled(kernel, x="bb")
    live = arrived(recorder, kernel, quirks=["flb-finish-uncounted"]).liveupdate
    with live.open() as node:
        node.retrieve_session("x").finish()

    assert flb_calls(recorder) == []


def test_7_3_finishes_what_somebody_asked_for(recorder, kernel):
    filled(kernel, x="bb")
    live = arrived(recorder, kernel, quirks=["flb-finish-uncounted"]).liveupdate
    live.flb_get_incoming(recorder.flb("pci"))
    live.flb_put_incoming(recorder.flb("pci"))
    with live.open() as node:
        node.retrieve_session("x").finish()

    assert flb_calls(recorder) == ["RETRIEVE pci", "FINISH pci"]


def test_7_3_counts_files_again_that_are_finished(recorder, kernel):
    filled(kernel, x="b", y="b")
    live = arrived(recorder, kernel, quirks=["flb-finish-uncounted"]).liveupdate
    with live.open() as node:
        node.retrieve_session("x").finish()
        live.flb_get_incoming(recorder.flb("pci"))
        live.flb_put_incoming(recorder.flb("pci"))
        node.retrieve_session("y").finish()

    assert flb_calls(recorder) == ["RETRIEVE pci"]


def test_what_is_registered_late_does_not_count_for_files_before(recorder, kernel):
    (first,) = filled(kernel, x="b")
    late = recorder.flb("late")
    kernel.liveupdate.register_flb(recorder.handler(B), late)
    (second,) = filled(kernel, y="b")
    recorder.begin()
    first.close()
    assert flb_calls(recorder) == []
    kernel.liveupdate.unregister_flb(recorder.handler(B), late)
    second.close()

    assert flb_calls(recorder) == ["UNPRESERVE late", "UNPRESERVE pci"]


def test_a_handler_may_bring_its_flbs(recorder, kernel):
    handler = dataclasses.replace(recorder.handler(A), compatible="c", flbs=(recorder.flb("own"),))
    kernel.liveupdate.register_handler(handler)
    assert errno_of(kernel.liveupdate.register_flb, handler, recorder.flb("own")) == errno.EEXIST

    other = dataclasses.replace(handler, compatible="d", flbs=(rig.Recorder().flb("own"),))
    assert errno_of(kernel.liveupdate.register_handler, other) == errno.EEXIST
    with pytest.raises(ValueError, match="two FLBs"):
        rig.Kernel(rig.machine(), file_handlers=[handler, other])


def test_more_puts_than_gets_do_nothing(recorder, kernel):
    live, pci = kernel.liveupdate, recorder.flb("pci")
    live.flb_put_outgoing(pci)
    live.flb_put_incoming(pci)
    filled(kernel, x="b")
    live = arrived(recorder, kernel).liveupdate
    with live.open() as node:
        node.retrieve_session("x").finish()
    recorder.begin()
    live.flb_put_incoming(pci)

    assert recorder.calls == []


@pytest.mark.parametrize("at", [1, 2])
def test_an_interrupt_in_preserve_undoes_what_was_done(recorder, kernel, at):
    (session,) = filled(kernel, x="")
    recorder.begin({at: INTERRUPT})
    with pytest.raises(KeyboardInterrupt):
        session.preserve(Thing("a", 1), 1)

    assert flb_calls(recorder)[at:] == ["UNPRESERVE iommu"][: at - 1]
    recorder.begin()
    session.preserve(Thing("a", 1), 1)
    assert flb_calls(recorder) == ["PRESERVE iommu", "PRESERVE pci"]


# ---- hostile pages ----


@pytest.mark.parametrize("count", [64, 1 << 31, (1 << 64) - 1])
def test_a_count_beyond_the_page_is_a_panic(recorder, kernel, count):
    """7.3 reads what lies behind the page."""
    filled(kernel, x="b")

    def edit(handover):
        head, _ = rig.walked(kernel.memory, handover).subtrees["LUO"]
        page = struct.unpack("<Q", bytes(kernel.memory.view(head + 24, 8)))[0]
        kernel.memory.view(page + 8, 8)[:] = struct.pack("<Q", count)

    kernel.on_handover = edit
    with pytest.raises(KernelPanic):
        arrived(recorder, kernel, preflight=False)
