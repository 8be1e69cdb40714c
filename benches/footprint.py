"""What a live update takes of memory beyond its image: ``footprint.py DEVICES`` prints JSON.

peak   the most that was resident (VmHWM), from just before the first kernel is built on,
less what was resident then (interpreter, numpy, the hardware: the device tree's columns and names),
less the image: every preserved page, and the pages of the map.

So it is what both kernels keep and what the phases need for a while: flags, order, tables, page
state, the columns of records being written and read, memory touched for PREPARE and not used.
Everything is in one process. Callbacks are native: what a callback in Python keeps for a while is
its own. ``prepare`` is the same up to the end of PREPARE.
"""

import ctypes
import gc
import json
import sys
from pathlib import Path

import hosts
from race import timed


def status(name: str) -> int:
    """Return a line of ``/proc/self/status`` in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"no {name} in /proc/self/status")


def main(n: int) -> None:
    host = hosts.Host(n)
    host.machine.devices.index()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = status("VmRSS")
    kernel = hosts.build(host.machine, "native").boot()
    kernel.devices.request(host.requested)
    kernel.kexec_load(hosts.build(host.machine, "native"))
    seconds, _ = timed(kernel.luo.prepare)
    prepared = status("VmHWM")
    early = _image(kernel.image_sizes(), kernel.memory.page_size)
    host.check_saved(kernel)
    running = kernel.kexec()
    host.check_restored(running)
    image = _image(running.arrival.departure.image, running.memory.page_size)
    running.luo.finish()
    peak = status("VmHWM")
    running.close()
    devices = len(host.order)
    told = {
        "items": devices,
        "devices": n,
        "bytes": peak - before - image,
        "value": (peak - before - image) / devices,
        "prepare": (prepared - before - early) / devices,
        "image": image,
        "hardware": host.machine.devices.table.nbytes,
        "seconds": seconds,
    }
    json.dump(told, sys.stdout)


def _image(sizes: dict[str, int], page_size: int) -> int:
    return sizes["preserved_pages"] * page_size + sizes["map_bytes"]


if __name__ == "__main__":
    main(int(sys.argv[1]))
