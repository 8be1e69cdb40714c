"""Sessions, files and FLBs against the plain model: anything that can happen, in any order."""

import contextlib
import copy
import errno
from collections import Counter

import session_rig as rig
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from session_model import (
    FILES_A_BLOCK,
    INTERRUPT,
    SESSIONS_A_BLOCK,
    Handler,
    Raises,
    Refused,
    Thing,
)
from session_model import Kernel as Model

#: Explaining a failure takes minutes and adds nothing to the sequence.
PHASES = [phase for phase in Phase if phase is not Phase.explain]

ALL = frozenset({"freeze", "unfreeze", "can_finish", "get_id"})
#: The last two want the same files; who was registered first gets them.
HANDLERS = (
    Handler("memory-v1", frozenset({"memory"}), ALL),
    Handler("plain-v1", frozenset({"plain"})),
    Handler("both-v1", frozenset({"memory", "plain", "both"}), frozenset({"freeze", "can_finish"})),
    Handler("vfio-v2", frozenset({"vfio", "plain"}), frozenset({"unfreeze", "get_id"})),
)
FLBS = ("iommu", "pci", "of-none")
NAMES = ("vm", "state", "a", "x" * 63)
TOKENS = (0, 1, 2, 3, (1 << 64) - 1)

outcomes = st.sampled_from(
    [-errno.EBUSY, -errno.ENODEV, 1, Raises(errno.ENOSPC), Raises(None), INTERRUPT]
)
things = st.builds(
    Thing,
    st.sampled_from(["memory", "plain", "both", "vfio", "socket"]),
    st.integers(0, 3),
    st.integers(0, 1),
)
some_handlers = st.just(HANDLERS) | st.lists(st.sampled_from(HANDLERS), unique=True).map(tuple)
numbers = st.integers(0, 999)


@st.composite
def software(draw):
    """Handlers and FLBs of a kernel, mostly all; and whether live update is on."""
    handlers = draw(some_handlers)
    links = [(part, name) for part in handlers for name in FLBS if draw(st.booleans())]
    return handlers, tuple(draw(st.permutations(links))), draw(st.integers(0, 9)) > 0


class Sessions(RuleBasedStateMachine):
    """A machine, the kernel that runs on it, and what the model says that it does."""

    @initialize(parts=software())
    def cold_boot(self, parts):
        """Switch a machine on."""
        self.recorder = rig.Recorder()
        self.machine = rig.machine()
        self.generation = 0
        self.model, self.kernel = self.build(parts, None)
        self.kernel.boot()
        self.settle()

    def build(self, parts, handed):
        """The same kernel twice: the model's, which runs already, and the engine's."""
        handlers, links, enabled = parts
        model = Model(handed, enabled=enabled)
        if enabled:
            for part in handlers:
                model.register_handler(part)
            for part, name in links:
                model.register_flb(part, name)
        made = rig.kernel(
            self.machine,
            self.recorder,
            handlers,
            links if enabled else (),
            cmdline=f"kho=on liveupdate={int(enabled)}",
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
            if not left:
                break
            number = data.draw(st.sampled_from(left))
            asks = plan.calls[number].event in ("CAN_PRESERVE", "CAN_FINISH")
            faults[number] = False if asks and data.draw(st.booleans()) else data.draw(outcomes)
        self.model.begin(faults)
        self.recorder.begin(faults)
        wanted = rig.expected_outcome_of(expected, self.model)
        outcome = rig.outcome_of(got)
        assert self.recorder.calls == self.model.calls
        assert outcome == wanted, faults
        return wanted

    @property
    def live(self):
        """The kernel's LUO."""
        return self.kernel.liveupdate

    def pick(self, number):
        """A descriptor that is open, or None."""
        return number % len(self.open) if self.open else None

    # ---- registration ----

    @rule(data=st.data(), part=st.sampled_from(HANDLERS))
    def register_handler(self, data, part):
        handler = self.recorder.handler(part)
        self.both(
            data,
            lambda model: model.register_handler(part),
            lambda: self.live.register_handler(handler),
        )

    def users(self, part):
        """Files of a handler that are preserved, or came over."""
        return [
            file
            for session in (*self.model.outgoing, *self.model.incoming)
            for file in session.files
            if file.handler == part
        ]

    @precondition(lambda self: self.model.handlers)
    @rule(data=st.data(), number=numbers)
    def unregister_handler(self, data, number):
        part = self.model.handlers[number % len(self.model.handlers)]
        if self.users(part):
            return  # its module is pinned
        self.both(
            data,
            lambda model: model.unregister_handler(part),
            lambda: self.live.unregister_handler(self.recorder.handler(part)),
        )

    @rule(data=st.data(), part=st.sampled_from(HANDLERS), name=st.sampled_from(FLBS))
    def register_flb(self, data, part, name):
        if self.users(part):
            return
        self.both(
            data,
            lambda model: model.register_flb(part, name),
            lambda: self.live.register_flb(self.recorder.handler(part), self.recorder.flb(name)),
        )

    @precondition(lambda self: any(self.model.links.values()))
    @rule(data=st.data(), number=numbers)
    def unregister_flb(self, data, number):
        links = [
            (part, name)
            for part in self.model.handlers
            for name in self.model.links[part.compatible]
        ]
        part, name = links[number % len(links)]
        if self.users(part):
            return
        self.both(
            data,
            lambda model: model.unregister_flb(part, name),
            lambda: self.live.unregister_flb(self.recorder.handler(part), self.recorder.flb(name)),
        )

    # ---- the node ----

    @rule(data=st.data())
    def open_node(self, data):
        def got():
            self.node = self.live.open()

        self.both(data, Model.open, got)

    @precondition(lambda self: self.node)
    @rule(data=st.data())
    def close_node(self, data):
        self.both(data, Model.close_node, self.node.close)
        self.node = None

    @precondition(lambda self: self.node)
    @rule(
        data=st.data(), name=st.sampled_from(NAMES) | st.sampled_from(["", "x" * 64, "ü" * 32, "ü"])
    )
    def create_session(self, data, name):
        def expected(model):
            model.create_session(name)

        def got():
            self.open.append(self.node.create_session(name))

        self.both(data, expected, got)

    @precondition(lambda self: self.node)
    @rule(data=st.data(), count=st.sampled_from([SESSIONS_A_BLOCK - 1, SESSIONS_A_BLOCK, 103]))
    def create_many(self, data, count):
        for number in range(count - len(self.model.outgoing)):
            name = f"{self.generation}-{number}"
            if all(session.name != name for session in self.model.outgoing):
                self.create_session_quietly(data, name)

    def create_session_quietly(self, data, name):
        self.both(
            data,
            lambda model: model.create_session(name) and None,
            lambda: self.open.append(self.node.create_session(name)),
            fails=False,
        )

    @precondition(lambda self: self.node and self.model.incoming)
    @rule(
        data=st.data(), number=numbers, odd=st.sampled_from([None] * 9 + ["", "nobody", "x" * 64])
    )
    def retrieve_session(self, data, number, odd):
        incoming = self.model.incoming
        name = incoming[number % len(incoming)].name if odd is None else odd
        self.both(
            data,
            lambda model: model.retrieve_session(name) and None,
            lambda: self.open.append(self.node.retrieve_session(name)),
        )

    # ---- sessions ----

    @precondition(lambda self: self.open)
    @rule(data=st.data(), number=numbers, thing=things, token=st.sampled_from(TOKENS))
    def preserve(self, data, number, thing, token):
        at = self.pick(number)
        self.both(
            data,
            lambda model: model.preserve(model.descriptors[at], thing, token),
            lambda: self.open[at].preserve(thing, token),
        )

    @precondition(lambda self: self.open)
    @rule(
        data=st.data(),
        number=numbers,
        count=st.sampled_from([FILES_A_BLOCK - 1, FILES_A_BLOCK, FILES_A_BLOCK + 1, 127]),
    )
    def preserve_many(self, data, number, count):
        at = self.pick(number)
        for token in range(10, 10 + count):
            thing = Thing("plain", (self.generation, number, token))
            self.both(
                data,
                lambda model, thing=thing, token=token: model.preserve(
                    model.descriptors[at], thing, token
                ),
                lambda thing=thing, token=token: self.open[at].preserve(thing, token),
                fails=False,
            )

    @precondition(lambda self: any(file.file for s in self.model.incoming for file in s.files))
    @rule(data=st.data(), number=numbers, which=numbers, token=st.sampled_from(TOKENS))
    def preserve_again(self, data, number, which, token):
        """What was retrieved and is not finished, for the next update."""
        retrieved = [f.file for s in self.model.incoming for f in s.files if f.file]
        self.preserve_this(data, number, retrieved[which % len(retrieved)], token)

    def preserve_this(self, data, number, thing, token):
        at = self.pick(number)
        if at is None:
            return
        self.both(
            data,
            lambda model: model.preserve(model.descriptors[at], thing, token),
            lambda: self.open[at].preserve(thing, token),
        )

    @precondition(lambda self: self.open)
    @rule(data=st.data(), number=numbers, which=numbers)
    def retrieve(self, data, number, which):
        at = self.pick(number)
        tokens = [file.token for file in self.model.descriptors[at].files] + [5]
        token = tokens[which % len(tokens)]
        self.both(
            data,
            lambda model: model.retrieve(model.descriptors[at], token),
            lambda: self.open[at].retrieve(token),
        )

    @precondition(lambda self: self.open)
    @rule(data=st.data(), number=numbers)
    def finish(self, data, number):
        at = self.pick(number)
        self.both(
            data,
            lambda model: model.finish(model.descriptors[at]),
            lambda: self.open[at].finish(),
        )

    @precondition(lambda self: self.open)
    @rule(data=st.data(), number=numbers)
    def close(self, data, number):
        at = self.pick(number)
        session = self.open[at]
        self.both(data, lambda model: model.close(model.descriptors[at]), session.close)
        del self.open[at]

    @rule(data=st.data())
    def close_all(self, data):
        """Close everything, newest first: LUO has then what it had in the beginning."""
        while self.open:
            at = len(self.open) - 1
            self.both(
                data,
                lambda model, at=at: model.close(model.descriptors[at]),
                self.open[at].close,
                fails=False,
            )
            del self.open[at]
        assert not self.model.enabled or self.model.outgoing_pages == 2

    # ---- FLBs ----

    @rule(data=st.data(), name=st.sampled_from(FLBS), back=st.booleans())
    def incoming_flb(self, data, name, back):
        flb = self.recorder.flb(name)
        self.both(
            data, lambda model: model.get_incoming(name), lambda: self.live.flb_get_incoming(flb)
        )
        if back and self.model.flbs.get(name) and self.model.flbs[name].incoming_count:
            self.both(
                data,
                lambda model: model.put_incoming(name),
                lambda: self.live.flb_put_incoming(flb),
            )

    @rule(data=st.data(), name=st.sampled_from(FLBS))
    def outgoing_flb(self, data, name):
        """A user holds it for a moment."""
        flb = self.recorder.flb(name)
        outcome = self.both(
            data, lambda model: model.get_outgoing(name), lambda: self.live.flb_get_outgoing(flb)
        )
        if outcome == self.model.flbs.get(name, outcome) or isinstance(outcome[0], int):
            return
        self.both(
            data, lambda model: model.put_outgoing(name), lambda: self.live.flb_put_outgoing(flb)
        )

    # ---- reboot ----

    @rule(data=st.data())
    def freeze_and_go_on(self, data):
        """All is frozen, and no jump follows."""
        outcome = self.both(data, Model.freeze, self.live.freeze)
        if outcome is None:
            self.both(data, Model.unfreeze, self.live.unfreeze)

    @rule(data=st.data(), parts=software())
    def kexec(self, data, parts):
        """Jump, unless a freeze callback fails; the next kernel has whatever it has."""
        arrived, before = [], self.kernel

        def expected(model):
            model.freeze()

        def got():
            arrived.append(before.kexec())

        self.kernel.kexec_load(self.build(parts, None)[1])
        before.on_handover = lambda handover: rig.check_bytes(
            self.machine.memory, handover, self.model
        )
        self.both(data, expected, got)
        if not arrived:
            return
        self.generation += 1
        handed = self.model.hand_over() if self.model.enabled else None
        self.recorder.held.clear()
        self.model, _ = self.build(parts, handed)
        self.kernel = arrived[0]
        self.settle()

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
    def same_references(self):
        assert +self.recorder.held == Counter(self.model.held)

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
