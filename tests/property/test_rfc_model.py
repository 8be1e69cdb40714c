"""The engine against a plain model of RFC v1: anything that can happen, in any order."""

import contextlib
import copy
import errno

from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from luo_model import NORMAL, PREPARED, Machine, Owner, Raises, Refused, Software, Subsystem
from luo_model import Kernel as Model

from luo import kernel as engine
from luo.device import Bus, Driver, LiveUpdateOps
from luo.errors import CallbackError
from luo.liveupdate import Subsystem as EngineSubsystem
from luo.machine import Machine as EngineMachine
from luo.quirks import HOME, QUIRKS

DRIVERS, BUSES, SUBSYSTEMS = ("d0", "d1", "d2"), ("b0", "b1"), ("s0", "s1", "s2", "s3")
EVENTS = ("prepare", "reboot", "finish", "cancel", "restore")
MOST_DEVICES = 9
#: An order that is not defined is no order to compare.
UNDEFINED = frozenset({"depth-from-garbage"})
#: Explaining a failure takes minutes and adds nothing to the sequence.
PHASES = [phase for phase in Phase if phase is not Phase.explain]

# ---- what there may be ----

events = st.builds(frozenset, st.just(EVENTS) | st.lists(st.sampled_from(EVENTS), max_size=4))
parts = st.builds(Subsystem, st.sampled_from(SUBSYSTEMS), st.integers(0, 2), events)
on_bus, with_driver = st.sampled_from([None, *BUSES]), st.sampled_from([None, *DRIVERS])


@st.composite
def software(draw):
    """A kernel's drivers and buses, some of them without a table or missing, and subsystems."""

    def some(names):
        tables = [st.none(), *[events] * 9]
        return tuple(
            Owner(name, draw(draw(st.sampled_from(tables))), draw(st.booleans()))
            for name in names
            if draw(st.integers(0, 14))
        )

    chain = draw(st.lists(parts, max_size=3, unique_by=lambda part: part.name))
    return Software(some(DRIVERS), some(BUSES), tuple(chain), draw(st.integers(0, 7)) > 0)


failures = st.sampled_from(
    [-errno.EBUSY, -errno.ENODEV, 1, errno.EBUSY, Raises(errno.ENOSPC), Raises(None)]
)


# ---- the same for the engine ----


class Recorder:
    """Callbacks that write themselves down and do what they are told."""

    def __init__(self):
        self.calls = []
        self.faults = {}

    def callback(self, event, kind, name, reclaims=False):
        """A callback of a subsystem, driver or bus."""

        def called(subject):
            path = None if kind == "subsystem" else subject.path
            call = (event.upper(), kind, name, path)
            self.calls.append(call)
            outcome = self.faults.get(call)
            if isinstance(outcome, Raises):
                raise OSError(outcome.errno, "on purpose") if outcome.errno else ValueError
            if reclaims and not outcome:
                subject.reclaim()
            return outcome

        return called

    def ops(self, kind, owner):
        """The table of a driver or bus."""
        if owner.table is None:
            return None
        return LiveUpdateOps(
            state_size=8,
            **{
                event: self.callback(event, kind, owner.name, event == "restore" and owner.reclaims)
                for event in owner.table
            },
        )

    def driver(self, owner):
        """A driver, which probes and shuts down as well."""
        own = {name: self.callback(name, "driver", owner.name) for name in ("probe", "shutdown")}
        return Driver(owner.name, self.ops("driver", owner), **own)

    def subsystem(self, part):
        """A subsystem."""
        return EngineSubsystem(
            part.name,
            priority=part.priority,
            **{event: self.callback(event, "subsystem", part.name) for event in part.events},
        )


def told(error):
    """What a callback's error says: the call, its errno and what it returned."""
    return (error.event, error.kind, error.name, error.device), error.errno, error.returned


def expected_told(failure):
    """What it shall say."""
    return failure.call, failure.errno, failure.returned


def outcome_of(call, *arguments):
    """What a call of the engine came to, in the model's words."""
    try:
        return call(*arguments)
    except CallbackError as error:
        return error.errno, told(error), [told(undone) for undone in error.undo_errors]
    except OSError as error:
        return error.errno, None, []


def expected_outcome_of(call, *arguments):
    """What the model says that it shall come to."""
    try:
        return call(*arguments)
    except Refused as refused:
        if refused.failure is None:
            return refused.errno, None, []  # what fails on the way back is in the error's notes
        undone = [expected_told(failure) for failure in refused.undone]
        return refused.errno, expected_told(refused.failure), undone


class LiveUpdates(RuleBasedStateMachine):
    """A machine, whatever kernel runs on it, and what the model says that it does."""

    behaviour, kho_abi, quirks, extra = "intended", "kho-v4", frozenset(), ()

    @initialize(data=st.data(), parts=software())
    def cold_boot(self, data, parts):
        """Switch a machine on."""
        self.recorder = Recorder()
        self.hardware, self.machine = Machine(), EngineMachine("32MiB")
        for number in range(data.draw(st.integers(1, 7))):
            parent = data.draw(st.sampled_from([None, *range(number)]))
            self.plug(parent, data.draw(on_bus), data.draw(with_driver))
        self.switch_on(parts)

    def plug(self, parent, bus, driver):
        name = f"n{len(self.hardware.devices)}"
        above = None if parent is None else self.hardware.devices[parent].path
        self.hardware.add(name, parent, bus, driver)
        self.machine.devices.add(name, above, bus, driver)

    def build(self, parts):
        """The same kernel twice: the model's and the engine's."""
        made = engine.Kernel(
            self.machine,
            drivers=[self.recorder.driver(owner) for owner in parts.drivers],
            buses=[Bus(owner.name, self.recorder.ops("bus", owner)) for owner in parts.buses],
            subsystems=[self.recorder.subsystem(part) for part in parts.subsystems],
            cmdline=f"kho=on liveupdate={int(parts.enabled)}",
            kho_abi=self.kho_abi,
            behaviour=self.behaviour,
            quirks=self.extra,
        )
        return Model(self.hardware, parts, self.quirks), made

    def switch_on(self, parts):
        self.model, self.kernel = self.build(parts)
        self.model.boot()
        self.kernel.boot()

    def faults(self, data, event):
        """Let up to two of the callbacks fail that the model is going to call."""
        faults = {}
        for _ in range(data.draw(st.sampled_from([0, 1, 1, 2]))):
            plan = copy.deepcopy(self.model)
            plan.calls, plan.faults = [], faults
            with contextlib.suppress(Refused):
                event(plan)
            calls = [call for call in plan.calls if call[0] != "SHUTDOWN" and call not in faults]
            if not calls:
                break
            call = data.draw(st.sampled_from(calls))
            outcome = data.draw(failures)
            if call[0] == "PROBE":
                outcome = Raises(errno.ENODEV)  # a probe returns nothing
            faults[call] = outcome
        self.model.faults = self.recorder.faults = faults

    def both(self, expected, call, *arguments):
        """Do something in both, and compare what came of it."""
        wanted = expected_outcome_of(expected, *arguments)
        assert outcome_of(call, *arguments) == wanted
        return wanted

    # ---- events ----

    @rule(data=st.data())
    def prepare(self, data):
        self.faults(data, Model.prepare)
        self.both(self.model.prepare, self.kernel.luo.prepare)

    @precondition(lambda self: self.model.state != NORMAL)
    @rule(data=st.data())
    def cancel(self, data):
        self.faults(data, Model.cancel)
        self.both(
            lambda: [*map(expected_told, self.model.cancel())],
            lambda: [*map(told, self.kernel.luo.cancel().failures)],
        )

    @precondition(lambda self: self.model.state == PREPARED)
    @rule(data=st.data())
    def dry_reboot(self, data):
        self.faults(data, Model.dry_reboot)
        self.both(
            lambda: [*map(expected_told, self.model.dry_reboot())],
            lambda: [*map(told, self.kernel.luo.dry_reboot().failures)],
        )

    @precondition(lambda self: self.model.state != NORMAL)
    @rule(data=st.data())
    def finish(self, data):
        self.faults(data, Model.finish)

        def expected():
            lost, failed = self.model.finish()
            return lost, [*map(expected_told, failed)]

        def got():
            result = self.kernel.luo.finish()
            return list(result.unreclaimed), [*map(told, result.failures)]

        self.both(expected, got)

    @rule(parts=software())
    def load(self, parts):
        model, made = self.build(parts)
        self.model.load(model)
        self.kernel.kexec_load(made)

    @rule(data=st.data())
    def kexec(self, data):
        self.faults(data, Model.kexec)
        arrived = []

        def expected():
            arrived.append(self.model.kexec())

        def got():
            arrived.append(self.kernel.kexec())

        self.both(expected, got)
        if arrived:
            self.model, self.kernel = arrived
            failed = [*map(expected_told, self.model.restore_failures)]
            assert [*map(told, self.kernel.restore_failures)] == failed

    @precondition(lambda self: self.model.state == NORMAL and self.model.enabled)
    @rule(wanted=st.sets(st.integers(0, MOST_DEVICES - 1)))
    def request_and_prepare(self, wanted):
        for number in self.hardware.alive():
            self.request(number, number not in wanted)
        self.recorder.faults = self.model.faults = {}
        self.both(self.model.prepare, self.kernel.luo.prepare)

    @precondition(lambda self: self.model.state == NORMAL and self.model.enabled)
    @rule(data=st.data(), parts=software(), wanted=st.sets(st.integers(0, MOST_DEVICES - 1)))
    def live_update(self, data, parts, wanted):
        self.load(parts)
        self.request_and_prepare(wanted)
        self.agree()
        self.kexec(data)

    @precondition(lambda self: self.model.state != PREPARED)
    @rule(parts=software())
    def power_cycle(self, parts):
        self.recorder.faults = self.model.faults = {}
        self.model.shutdown()
        self.kernel.shutdown()
        self.agree_on_calls()
        self.switch_on(parts)

    # ---- who takes part ----

    @rule(part=parts)
    def register(self, part):
        self.both(
            lambda: self.model.register(part),
            lambda: self.kernel.luo.register(self.recorder.subsystem(part)),
        )

    @rule(name=st.sampled_from([*SUBSYSTEMS, "devices"]))
    def unregister(self, name):
        self.both(self.model.unregister, self.kernel.luo.unregister, name)

    # ---- devices ----

    def one_of(self, data):
        """The number of a device that is there, or None."""
        alive = self.hardware.alive()
        return data.draw(st.sampled_from(alive)) if alive else None

    def request(self, number, on):
        def write(number, on):
            self.kernel.devices[self.hardware.devices[number].path].requested = on

        self.both(self.model.request, write, number, on)

    @precondition(lambda self: self.model.enabled)
    @rule(data=st.data(), on=st.sampled_from([True, True, False]))
    def write_requested(self, data, on):
        number = self.one_of(data)
        if number is not None:
            self.request(number, on)

    @rule(data=st.data(), name=st.sampled_from([*DRIVERS, "d9"]))
    def bind(self, data, name):
        number = self.one_of(data)
        if number is not None:
            self.faults(data, lambda plan: plan.bind(number, name))
            device = self.kernel.devices[self.hardware.devices[number].path]
            self.both(lambda: self.model.bind(number, name), lambda: device.bind(name))

    @rule(data=st.data())
    def unbind(self, data):
        number = self.one_of(data)
        if number is not None:
            device = self.kernel.devices[self.hardware.devices[number].path]
            self.both(lambda: self.model.unbind(number), device.unbind)

    @precondition(lambda self: len(self.hardware.devices) < MOST_DEVICES)
    @rule(data=st.data(), bus=on_bus, driver=with_driver)
    def hot_add(self, data, bus, driver):
        self.plug(data.draw(st.sampled_from([None, *self.hardware.alive()])), bus, driver)
        self.model.rescan()
        self.kernel.devices.rescan()

    @rule(data=st.data())
    def hot_remove(self, data):
        number = self.one_of(data)
        if number is not None:
            self.machine.devices.remove(self.hardware.devices[number].path)
            self.hardware.remove(number)

    # ---- after every step ----

    def agree_on_calls(self):
        assert self.recorder.calls == self.model.calls
        self.recorder.calls.clear()
        self.model.calls.clear()

    @invariant()
    def agree(self):
        self.agree_on_calls()
        kernel, model, devices = self.kernel, self.model, self.kernel.devices
        assert kernel.luo.state.name == model.state
        alive = self.hardware.alive()
        for flag in ("requested", "preserved", "reclaimed"):
            column = getattr(devices, flag)
            assert {number for number in alive if column[number]} == getattr(
                model, flag
            ).intersection(alive), flag
        drivers = {number: devices.driver_of(number) for number in alive}
        names = {number: driver and driver.name for number, driver in drivers.items()}
        assert names == {number: model.bound[number] for number in alive}
        assert [int(devices.references[number]) for number in alive] == [
            model.references(number) for number in alive
        ]

    def teardown(self):
        if hasattr(self, "kernel"):
            self.kernel.close()


class Rfc1(LiveUpdates):
    """The same with every quirk that has an outcome to compare."""

    behaviour, kho_abi = "rfc1", HOME
    extra = tuple(f"-{name}" for name in UNDEFINED)
    quirks = frozenset(QUIRKS) - UNDEFINED


class Mixed(LiveUpdates):
    """The same with any of the quirks, switched one by one."""

    kho_abi = HOME

    @initialize(
        data=st.data(),
        parts=software(),
        quirks=st.sets(st.sampled_from(sorted(set(QUIRKS) - UNDEFINED))),
    )
    def cold_boot(self, data, parts, quirks):
        self.quirks = frozenset(quirks)
        self.extra = tuple(quirks)
        super().cold_boot(data, parts)


TestIntended, TestRfc1, TestMixed = LiveUpdates.TestCase, Rfc1.TestCase, Mixed.TestCase
TestIntended.settings = TestRfc1.settings = TestMixed.settings = settings(
    stateful_step_count=30, report_multiple_bugs=False, phases=PHASES
)
