"""A trace as JSON that chrome://tracing, Perfetto and speedscope read.

Google, "Trace Event Format": https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Final, TextIO

from luo.profile.trace import Process, Trace, printable

__all__ = ["write"]

# An end is written as the time that it is. With a duration, readers add two fractions, and the
# sum may lie a hair behind the begin of the next.
_BEGIN: Final = '"B"'
_INSTANT: Final = '"i","s":"t"'


def write(trace: Trace, stream: TextIO) -> None:
    """Write *trace* to *stream*, one event a line, as they are made.

    Times are in microseconds with three places, from the begin of the trace, which
    ``otherData.begin_ns`` says.

    Raises:
        OSError: of the stream.
    """
    about = {**trace.about, "begin_ns": trace.begin_ns}
    stream.write(f'{{"displayTimeUnit":"ns","otherData":{_json(about)},"traceEvents":[')
    comma = "\n"
    for event in _events(trace):
        stream.write(comma + event)
        comma = ",\n"
    stream.write("\n]}\n")


def _events(trace: Trace) -> Iterator[str]:
    for rank, process in enumerate(trace.processes):
        pid = process.pid
        yield _metadata("process_name", pid, 0, name=process.name)
        yield _metadata("process_sort_index", pid, 0, sort_index=rank)
        if process.remarks:
            yield _metadata("process_labels", pid, 0, labels="; ".join(process.remarks))
        yield from _of_process(process, trace.begin_ns)


def _of_process(process: Process, origin: int) -> Iterator[str]:
    for tid, lane in enumerate(process.lanes, 1):
        yield _metadata("thread_name", process.pid, tid, name=lane.name)
        yield _metadata("thread_sort_index", process.pid, tid, sort_index=tid)
        where = f'"pid":{process.pid},"tid":{tid}'
        for one in lane.slices():
            name = _json(one.name)
            args = f',"args":{_json(one.args)}' if one.args else ""
            yield (
                f'{{"ph":{_BEGIN if one.end_ns is not None else _INSTANT},'
                f'"ts":{_microseconds(one.begin_ns - origin)},{where},'
                f'"name":{name},"cat":{_json(",".join(one.categories))}{args}}}'
            )
            if one.end_ns is not None:
                end = _microseconds(one.end_ns - origin)
                yield f'{{"ph":"E","ts":{end},{where},"name":{name}}}'
    for counter in process.counters:
        for ns, value in counter.points:
            yield (
                f'{{"ph":"C","ts":{_microseconds(ns - origin)},"pid":{process.pid},'
                f'"name":{_json(counter.name)},"args":{_json({counter.unit: value})}}}'
            )


def _metadata(what: str, pid: int, tid: int, **args: Any) -> str:
    return _json({"ph": "M", "name": what, "pid": pid, "tid": tid, "args": args})


def _microseconds(ns: int) -> str:
    sign = "-" if ns < 0 else ""
    return f"{sign}{abs(ns) // 1000}.{abs(ns) % 1000:03}"


def _json(value: Any) -> str:
    return json.dumps(_clean(value), separators=(",", ":"), allow_nan=False)


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, Mapping):
        return {printable(key): _clean(inner) for key, inner in value.items()}
    return value
