"""A trace as protobuf, which https://ui.perfetto.dev and the trace processor read.

Needs the package ``perfetto``. Names, categories and device paths are written once and then meant
by number ("interned"), so that a callback takes two packets of some 30 bytes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import IO, Any, Final

from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import (
    TracePacket,
    TrackDescriptor,
    TrackEvent,
)
from perfetto.trace_builder.proto_builder import StreamingTraceProtoBuilder

from luo.profile.trace import Counter, Lane, Process, Slice, Trace, printable

__all__ = ["write"]

_SEQUENCE: Final = 1
_NAMES: Final = "event_names"
_CATEGORIES: Final = "event_categories"
_KEYS: Final = "debug_annotation_names"
_VALUES: Final = "debug_annotation_string_values"


def write(trace: Trace, stream: IO[bytes]) -> None:
    """Write *trace* to *stream*, packet by packet, as they are made.

    Times are nanoseconds of the kernels' own clock.

    Raises:
        OSError: of the stream.
    """
    writer = _Writer(stream)
    for rank, process in enumerate(trace.processes):
        writer.process(process, rank)


class _Writer:
    """One sequence of packets, and what has been named in it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._builder = StreamingTraceProtoBuilder(stream)
        self._flags = TracePacket.SEQ_INCREMENTAL_STATE_CLEARED
        self._known: defaultdict[str, dict[str, int]] = defaultdict(dict)
        self._nr_tracks = 0

    # ---- packets ----

    def _packet(self) -> Any:
        packet = self._builder.create_packet()
        packet.trusted_packet_sequence_id = _SEQUENCE
        packet.sequence_flags = self._flags
        if self._flags == TracePacket.SEQ_INCREMENTAL_STATE_CLEARED:
            packet.first_packet_on_sequence = True
            self._flags = TracePacket.SEQ_NEEDS_INCREMENTAL_STATE
        return packet

    def _event(self, packet: Any, ns: int, kind: int, track: int) -> Any:
        packet.timestamp = ns
        event = packet.track_event
        event.type = kind
        event.track_uuid = track
        return event

    def _number(self, packet: Any, kind: str, text: str) -> int:
        """Return the number of *text*, which *packet* defines if it is the first to need it."""
        known = self._known[kind]
        number = known.get(text)
        if number is None:
            number = known[text] = len(known) + 1
            entry = getattr(packet.interned_data, kind).add(iid=number)
            if kind == _VALUES:
                entry.str = printable(text).encode()
            else:
                entry.name = printable(text)
        return number

    # ---- what there is ----

    def _track(self, parent: int, name: str, rank: int) -> tuple[Any, Any]:
        """Return a packet, not written yet, and the description of a new track in it."""
        self._nr_tracks += 1
        packet = self._packet()
        track = packet.track_descriptor
        track.uuid = self._nr_tracks
        track.name = printable(name)
        track.sibling_order_rank = rank
        track.child_ordering = TrackDescriptor.EXPLICIT
        if parent:
            track.parent_uuid = parent
        return packet, track

    def process(self, process: Process, rank: int) -> None:
        """Write a process with all that is in it.

        Lanes are tracks of the process, not threads: they have no number that another thread of
        the host might have too.
        """
        packet, track = self._track(0, process.name, rank)
        if process.pid:
            track.process.pid = process.pid
            track.process.process_name = printable(process.name)
            track.process.process_labels.extend(map(printable, process.remarks))
        self._builder.write_packet(packet)
        parent = track.uuid
        for at, lane in enumerate(process.lanes):
            self._lane(parent, lane, at)
        for at, counter in enumerate(process.counters, len(process.lanes)):
            self._counter(parent, counter, at)

    def _lane(self, parent: int, lane: Lane, rank: int) -> None:
        packet, track = self._track(parent, lane.name, rank)
        self._builder.write_packet(packet)
        for one in lane.slices():
            self._slice(track.uuid, one)

    def _slice(self, track: int, one: Slice) -> None:
        instant = one.end_ns is None
        packet = self._packet()
        event = self._event(
            packet,
            one.begin_ns,
            TrackEvent.TYPE_INSTANT if instant else TrackEvent.TYPE_SLICE_BEGIN,
            track,
        )
        event.name_iid = self._number(packet, _NAMES, one.name)
        for category in one.categories:
            event.category_iids.append(self._number(packet, _CATEGORIES, category))
        self._annotate(packet, event.debug_annotations, one.args)
        self._builder.write_packet(packet)
        if one.end_ns is not None:
            packet = self._packet()
            self._event(packet, one.end_ns, TrackEvent.TYPE_SLICE_END, track)
            self._builder.write_packet(packet)

    def _annotate(self, packet: Any, where: Any, args: Mapping[str, Any]) -> None:
        for key, value in args.items():
            note = where.add(name_iid=self._number(packet, _KEYS, key))
            if isinstance(value, Mapping):
                self._annotate(packet, note.dict_entries, value)
            elif isinstance(value, str):
                note.string_value_iid = self._number(packet, _VALUES, value)
            elif isinstance(value, int):
                note.int_value = value
            else:
                note.double_value = value

    def _counter(self, parent: int, counter: Counter, rank: int) -> None:
        packet, track = self._track(parent, counter.name, rank)
        track.counter.unit_name = counter.unit
        self._builder.write_packet(packet)
        for ns, value in counter.points:
            packet = self._packet()
            event = self._event(packet, ns, TrackEvent.TYPE_COUNTER, track.uuid)
            event.double_counter_value = value
            self._builder.write_packet(packet)
