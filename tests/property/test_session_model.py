"""Sessions, files and FLBs against the plain model: anything that can happen, in any order."""

import contextlib
import copy
import errno
import functools

import session_rig as rig
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from session_model import (
    FILES_A_BLOCK,
    INTERRUPT,
    SESSIONS_A_BLOCK,
    Flb,
    Handler,
    Raises,
    Refused,
    Thing,
)
from session_model import Kernel as Model

from luo import abi
from luo.quirks import MAINLINE_QUIRKS

#: Explaining a failure takes minutes and adds nothing to the sequence.
PHASES = [phase for phase in Phase if phase is not Phase.explain]

ALL = frozenset({"freeze", "unfreeze", "can_finish", "get_id"})
#: Some want the same files; who was registered first gets them.
HANDLERS = (
    Handler("memory-v1", frozenset({"memory"}), ALL),
    Handler("plain-v1", frozenset({"plain"}), frozenset({"can_finish"})),
    Handler("both-v1", frozenset({"memory", "plain", "both"}), frozenset({"freeze", "can_finish"})),
    Handler("vfio-v2", frozenset({"vfio", "plain"}), frozenset({"freeze", "unfreeze", "get_id"})),
    Handler("bare-v1", frozenset({"bare"})),
)
FLBS = ("iommu", "pci", "of-none")
NAMES = ("vm", "state", "a", "x" * 63)
TOKENS = (0, 1, 2, 3, (1 << 64) - 1)

raised = [Raises(errno.ENOSPC), Raises(None), INTERRUPT]
outcomes = st.sampled_from([-errno.EBUSY, -errno.ENODEV, 1, *raised])
answers = st.sampled_from([False, False, *raised])
#: Files are objects: of each there is one.
things = st.builds(
    functools.cache(Thing),
    st.sampled_from(["memory", "plain", "both", "vfio", "bare", "socket"]),
    st.integers(0, 3),
    st.integers(0, 1),
)
#: What may be done next, the more often the more interesting it is.
ACTIONS = (
    *("register_handler", "unregister_handler", "register_flb", "unregister_flb"),
    *("open_node", "close_node", "create_session", "create_many", "retrieve_session"),
    *("preserve",) * 5,
    *("retrieve",) * 4,
    *("preserve_many", "preserve_again", "retrieve_any", "close_all"),
    *("finish", "close", "incoming_flb", "outgoing_flb", "freeze_and_go_on", "update") * 2,
    *("update", "kexec"),
    *("round_trip",) * 5,
)
#: What mostly follows a jump.
AFTERWARDS = (
    *("retrieve", "finish", "close") * 3,
    *("preserve_again", "incoming_flb", "update"),
)
some_handlers = st.just(HANDLERS) | st.lists(st.sampled_from(HANDLERS), unique=True).map(tuple)
numbers = st.integers(0, 999)


@st.composite
def software(draw):
    """Handlers and FLBs of a kernel, mostly all; whether live update is on; faults of 7.3."""
    handlers = draw(some_handlers)
    links = [(part, name) for part in handlers for name in FLBS if draw(st.booleans())]
    quirks = frozenset(name for name in MAINLINE_QUIRKS if draw(st.integers(0, 4)) == 4)
    return handlers, tuple(draw(st.permutations(links))), draw(st.integers(0, 9)) < 9, quirks


def silent(call):
    """Return *call* without what it returns."""

    def called(*arguments):
        call(*arguments)

    return called


class Sessions(RuleBasedStateMachine):
    """A machine, the kernel that runs on it, and what the model says that it does."""

    blocks_max = abi.KHO_BLOCKS_MAX

    @initialize(parts=software(), most=st.sampled_from([10_000, 10_000, 2]))
    def cold_boot(self, parts, most):
        """Switch a machine on; a set has so many blocks at most."""
        abi.KHO_BLOCKS_MAX = most
        self.recorder = rig.Recorder()
        self.machine = rig.machine()
        self.generation, self.parts = 0, parts
        self.model, self.kernel = self.build(parts, None)
        rig.link(self.kernel.boot(), self.recorder, self.links)
        self.settle()

    def teardown(self):
        abi.KHO_BLOCKS_MAX = self.blocks_max

    def build(self, parts, handed):
        """The same kernel twice: the model's, which runs already, and the engine's."""
        handlers, links, enabled, quirks = parts
        self.links = links if enabled else ()
        model = Model(handed, enabled=enabled, quirks=quirks, blocks_max=abi.KHO_BLOCKS_MAX)
        if enabled:
            for part in handlers:
                model.register_handler(part)
            for part, name in links:
                model.register_flb(part, name)
        made = rig.kernel(
            self.machine,
            self.recorder,
            handlers,
            cmdline=f"kho=on liveupdate={int(enabled)}",
            quirks=quirks,
        )
        return model, made

    def settle(self):
        """A kernel has booted: nobody has anything open, and this is what is free."""
        self.node, self.open = None, []
        self.all_pages = self.pages()

    def pages(self):
        """Pages that are free, or LUO's."""
        mine = self.model.outgoing_pages + self.model.incoming_pages
        return self.kernel.memory.nr_free_pages() + self.kernel.kho.tree_pages + mine

    # ---- both ----

    def both(self, data, expected, got, *, fails=True):
        """Do something in both, some callbacks failing, and compare what came of it."""
        faults = {}
        for _ in range(data.draw(st.sampled_from([0, 0, 1, 1, 2])) if fails else 0):
            plan = copy.deepcopy(self.model)
            plan.begin(faults)
            with contextlib.suppress(Refused):
                expected(plan)
            left = [n for n in range(len(plan.calls)) if n not in faults]
            asked = [n for n in left if plan.calls[n].event == "CAN_FINISH"]
            if asked and data.draw(st.booleans()):
                left = asked
            if not left:
                break
            number = data.draw(st.sampled_from(left))
            asks = plan.calls[number].event in ("CAN_PRESERVE", "CAN_FINISH")
            faults[number] = data.draw(answers if asks else outcomes)
        self.model.begin(faults)
        self.recorder.begin(faults)
        problems = len(self.live.problems)
        old = self.live
        wanted = rig.expected_outcome_of(expected, self.model)
        outcome = rig.outcome_of(got)
        assert rig.short(self.recorder) == rig.short(self.model)
        assert self.recorder.calls == self.model.calls, faults
        assert outcome == wanted, faults
        if not old.gone:
            lost = [failure for failure in self.model.lost if failure.errno > 0]
            assert [*map(rig.told, old.problems[problems:])] == [*map(rig.expected_told, lost)]
        return wanted[0] == "returned"

    @property
    def live(self):
        """The kernel's LUO."""
        return self.kernel.liveupdate

    # ---- anything, in any order ----

    @rule(data=st.data(), what=st.sampled_from(ACTIONS))
    def act(self, data, what):
        """Do one thing: rules of their own would be switched off in most runs."""
        getattr(self, what)(data)

    # ---- registration ----

    def register_handler(self, data):
        part = data.draw(st.sampled_from(HANDLERS))
        handler = self.recorder.handler(part)
        self.both(
            data,
            lambda model: model.register_handler(part),
            lambda: self.live.register_handler(handler),
        )

    def unregister_handler(self, data):
        part = data.draw(st.sampled_from(HANDLERS))
        handler = self.recorder.handler(part)
        self.both(
            data,
            lambda model: model.unregister_handler(part),
            lambda: self.live.unregister_handler(handler),
        )

    def register_flb(self, data):
        part, name = data.draw(st.sampled_from(HANDLERS)), data.draw(st.sampled_from(FLBS))
        handler, flb = self.recorder.handler(part), self.recorder.flb(name)
        self.both(
            data,
            lambda model: model.register_flb(part, name),
            lambda: self.live.register_flb(handler, flb),
        )

    def unregister_flb(self, data):
        part, name = data.draw(st.sampled_from(HANDLERS)), data.draw(st.sampled_from(FLBS))
        handler, flb = self.recorder.handler(part), self.recorder.flb(name)
        self.both(
            data,
            lambda model: model.unregister_flb(part, name),
            lambda: self.live.unregister_flb(handler, flb),
        )

    # ---- the node ----

    def open_node(self, data):
        def got():
            self.node = self.live.open()

        self.both(data, Model.open, got)

    def close_node(self, data):
        if self.node is not None:
            self.both(data, Model.close_node, self.node.close)
            self.node = None

    def has_node(self, data):
        """Whether the node is open, after an attempt to open it."""
        if self.node is None:
            self.open_node(data)
        return self.node is not None

    def create_session(self, data):
        self.create(data, data.draw(st.sampled_from([*NAMES, "", "x" * 64, "ü" * 32, "ü"])))

    def create(self, data, name):
        if self.has_node(data):  # no callback is made
            self.both(
                data,
                silent(lambda model: model.create_session(name)),
                lambda: self.open.append(self.node.create_session(name)),
                fails=False,
            )

    def create_many(self, data):
        count = data.draw(st.sampled_from([SESSIONS_A_BLOCK - 1, SESSIONS_A_BLOCK, 103]))
        taken = {session.name for session in self.model.outgoing}
        names = (f"s{number}" for number in range(2 * count))
        for name in [name for name in names if name not in taken][: count - len(taken)]:
            self.create(data, name)

    def retrieve_session(self, data):
        names = [session.name for session in self.model.incoming]
        self.take(data, data.draw(st.sampled_from([*names[:60], "", "nobody", "x" * 64])))

    def take(self, data, name):
        if self.has_node(data):
            self.both(
                data,
                silent(lambda model: model.retrieve_session(name)),
                lambda: self.open.append(self.node.retrieve_session(name)),
                fails=False,
            )

    # ---- sessions ----

    def at(self, data, name):
        """Number of the descriptor of the outgoing session of that name, made if there is none."""
        for again in (False, True):
            for number, session in enumerate(self.model.descriptors):
                if session.name == name and not session.incoming:
                    return number
            if not again:
                self.create(data, name)
        return None

    def any_open(self, data):
        """Number of a descriptor, mostly of a session with files."""
        every = range(len(self.open))
        filled = [at for at in every if self.model.descriptors[at].files]
        return data.draw(st.sampled_from(filled if filled and data.draw(st.booleans()) else every))

    def preserve(self, data):
        at = self.at(data, data.draw(st.sampled_from(NAMES)))
        if at is not None:
            for _ in range(data.draw(st.integers(1, 4))):
                self.preserve_in(data, at, data.draw(things), data.draw(st.sampled_from(TOKENS)))

    def preserve_in(self, data, at, thing, token, **kwargs):
        self.both(
            data,
            lambda model: model.preserve(model.descriptors[at], thing, token),
            lambda: self.open[at].preserve(thing, token),
            **kwargs,
        )

    def preserve_many(self, data):
        name = data.draw(st.sampled_from(NAMES))
        at = self.at(data, name)
        if at is not None:
            count = FILES_A_BLOCK * data.draw(st.integers(1, 2)) + data.draw(st.integers(-1, 1))
            for token in range(10, 10 + count):
                thing = Thing("vfio", (name, token))
                self.preserve_in(data, at, thing, token, fails=False)

    def preserve_again(self, data):
        """What was retrieved, for the next update; in any session."""
        sessions = self.model.incoming
        files = [file.file for session in sessions for file in session.files if file.file]
        if files and self.open:
            at = data.draw(st.integers(0, len(self.open) - 1))
            self.preserve_in(data, at, data.draw(st.sampled_from(files)), data.draw(numbers))

    def retrieve(self, data):
        """Retrieve files of a session that came over."""
        if not self.has_node(data) or not self.model.incoming:
            return
        incoming = self.model.incoming
        session = data.draw(st.sampled_from([s for s in incoming if s.files] or incoming))
        if not session.retrieved:
            self.take(data, session.name)
        if session not in self.model.descriptors:
            return
        at = self.model.descriptors.index(session)
        tokens = [5, *(file.token for file in session.files)]
        for _ in range(data.draw(st.integers(1, 4))):
            self.retrieve_from(data, at, data.draw(st.sampled_from(tokens)))

    def retrieve_from(self, data, at, token):
        self.both(
            data,
            lambda model: model.retrieve(model.descriptors[at], token),
            lambda: self.open[at].retrieve(token),
        )

    def retrieve_any(self, data):
        if self.open:
            at = data.draw(st.integers(0, len(self.open) - 1))
            self.retrieve_from(data, at, data.draw(st.sampled_from(TOKENS)))

    def finish(self, data):
        if self.open:
            at = self.any_open(data)
            self.both(
                data,
                lambda model: model.finish(model.descriptors[at]),
                lambda: self.open[at].finish(),
            )

    def close(self, data):
        if self.open:
            self.close_this(data, self.any_open(data))

    def close_this(self, data, at, **kwargs):
        before = self.model.descriptors[at]
        self.both(
            data,
            lambda model: model.close(model.descriptors[at]),
            lambda: self.open[at].close(),
            **kwargs,
        )
        if before not in self.model.descriptors:
            del self.open[at]

    def close_all(self, data):
        """Close everything, newest first: LUO has then what it had in the beginning."""
        while self.open:
            self.close_this(data, len(self.open) - 1, fails=False)
        assert not self.model.enabled or self.model.outgoing_pages == 2

    # ---- FLBs ----

    def incoming_flb(self, data):
        name = data.draw(st.sampled_from(FLBS))
        flb = self.recorder.flb(name)
        self.both(
            data, lambda model: model.get_incoming(name), lambda: self.live.flb_get_incoming(flb)
        )
        if data.draw(st.booleans()) and self.model.flbs.get(name, Flb()).incoming_count:
            self.both(
                data,
                lambda model: model.put_incoming(name),
                lambda: self.live.flb_put_incoming(flb),
            )

    def outgoing_flb(self, data):
        """A user holds it for a moment."""
        name = data.draw(st.sampled_from(FLBS))
        flb = self.recorder.flb(name)
        if self.both(
            data, lambda model: model.get_outgoing(name), lambda: self.live.flb_get_outgoing(flb)
        ):
            self.both(
                data,
                lambda model: model.put_outgoing(name),
                lambda: self.live.flb_put_outgoing(flb),
            )

    # ---- reboot ----

    def freeze_and_go_on(self, data):
        """All is frozen, and no jump follows."""
        if self.both(data, Model.freeze, silent(self.live.freeze)):
            self.both(data, Model.unfreeze, self.live.unfreeze)

    def update(self, data):
        """Jump to a kernel of the same software."""
        self.jump(data, self.parts)

    def round_trip(self, data):
        """Preserve, update, retrieve, and end it: what single steps seldom come to."""
        for _ in range(data.draw(st.integers(1, 3))):
            self.preserve(data)
        self.jump(data, self.parts, fails=False)
        for _ in range(data.draw(st.integers(0, 2))):
            self.retrieve(data)
        self.finish(data)
        self.close(data)

    def kexec(self, data):
        """Jump to a kernel of other software."""
        self.jump(data, data.draw(software()))

    def jump(self, data, parts, **kwargs):
        arrived, before = [], self.kernel

        def expected(model):
            model.freeze()
            if model.enabled and model.hand_over().empty_block:  # the next kernel would panic
                model.unfreeze()
                raise Refused(errno.EPROTO)

        def check(handover):
            if self.model.frozen:
                rig.check_bytes(self.machine.memory, handover, self.model)

        def got():
            arrived.append(before.kexec())

        self.kernel.kexec_load(self.build(parts, None)[1])
        before.on_handover = check
        self.both(data, expected, got, **kwargs)
        if not arrived:
            return
        self.generation, self.parts = self.generation + 1, parts
        handed = self.model.hand_over() if self.model.enabled else None
        self.model, _ = self.build(parts, handed)
        self.kernel = rig.link(arrived[0], self.recorder, self.links)
        self.settle()
        if handed is not None and handed.sessions:
            for what in data.draw(st.lists(st.sampled_from(AFTERWARDS), max_size=6)):
                getattr(self, what)(data)

    # ---- what is there ----

    @invariant()
    def same_sessions(self):
        def listed(sessions):
            return [
                (
                    session.name,
                    session.retrieved,
                    [
                        (
                            file.token,
                            file.handler.compatible,
                            file.data,
                            file.file,
                            file.retrieve_status,
                        )
                        for file in session.files
                    ],
                )
                for session in sessions
            ]

        def expected(sessions):
            return [
                (
                    session.name,
                    session.retrieved,
                    [
                        (file.token, file.handler.compatible, file.data, file.file, file.status)
                        for file in session.files
                    ],
                )
                for session in sessions
            ]

        assert listed(self.live.outgoing) == expected(self.model.outgoing)
        assert listed(self.live.incoming) == expected(self.model.incoming)

    @invariant()
    def same_pages(self):
        kept, came = rig.beside()
        incoming = self.kernel.kho.incoming

        assert self.kernel.kho.nr_preserved == kept + self.model.outgoing_pages
        if incoming is not None:
            assert incoming.nr_unrestored == came + self.model.incoming_pages
        assert self.pages() == self.all_pages


TestSessions = Sessions.TestCase
TestSessions.settings = settings(stateful_step_count=30, phases=PHASES)
