"""The rows: which work, against which peers, and what must be reached.

A limit is the most that luo's time may be, as a multiple of the peer's: 0.125 is "8 times faster".
"""

from dataclasses import dataclass

__all__ = ["LIMITS", "PEERS", "ROWS", "Limit", "Row"]


@dataclass(frozen=True)
class Limit:
    """What one contender of luo's must reach against one peer.

    Args:
        luo: name of luo's contender.
        peer: name of the peer's.
        most: times the peer's time.
        percent: whether that is said in percent of it.
        shape: of the work, the only one that the limit is for.
    """

    luo: str
    peer: str
    most: float
    percent: bool = False
    shape: str = ""

    def words(self) -> str:
        """Say it as a person would."""
        if self.percent:
            return f"at most {100 * self.most:g} %"
        if self.most < 1:
            return f"{1 / self.most:g} times faster"
        return f"at most {self.most:g} times its time"


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Args:
        id: of the row; the group of its entries.
        work: what is done, in a few words.
        limits: what must be reached; none: the row is there for comparison.
        unit: of what is counted.
    """

    id: str
    work: str
    limits: tuple[Limit, ...] = ()
    unit: str = "node"


ROWS = {
    row.id: row
    for row in (
        Row(
            "fdt.write",
            "write device nodes of 5 properties from columns, 184 bytes each",
            (Limit("luo", "libfdt", 1 / 8, shape="fixed"),),
        ),
        Row(
            "fdt.calls",
            "write them with Python calls",
            (
                Limit("luo", "libfdt", 1.5),
                Limit("luo add_node", "libfdt", 1.25),
                Limit("luo", "pylibfdt", 1 / 8),
            ),
        ),
        Row(
            "fdt.read",
            "read them back into columns",
            (Limit("luo", "libfdt", 1 / 5, shape="fixed"),),
        ),
        Row(
            "fdt.lookup",
            "look up children by name, once indexed",
            (Limit("luo", "dict", 2),),
            "lookup",
        ),
        Row("fdt.index", "build the index of names"),
        Row(
            "map.preserve.random",
            "preserve order-0 folios all over memory, bulk",
            (Limit("luo", "walk", 1 / 4),),
            "folio",
        ),
        Row(
            "map.preserve.ordered",
            "preserve order-0 folios in order, bulk",
            (Limit("luo", "walk", 1 / 3), Limit("luo", "croaring", 1 / 3)),
            "folio",
        ),
        Row(
            "map.decode",
            "decode a map into given arrays",
            (Limit("luo", "callback walk", 1 / 1.5),),
            "folio",
        ),
        Row(
            "map.call",
            "one preserve_folio from Python",
            (Limit("luo", "empty call", 2.5, shape="ordered"),),
            "call",
        ),
        Row(
            "map.publish.v4",
            "publish a kho-v4 map: constant time",
            (Limit("luo", "empty map", 1.5),),
            "publication",
        ),
        Row("map.publish.v1", "publish a kho-v1 map", (Limit("luo", "chunk loop", 1.5),), "bitmap"),
        Row("map.density.preserve", "preserve a share of all pages, in order", (), "folio"),
        Row("map.density.decode", "decode a map of a share of all pages", (), "folio"),
        Row("map.generation.preserve", "preserve folios in order, by generation", (), "folio"),
        Row("map.generation.publish", "publish the map, by generation", (), "folio"),
        Row("map.generation.read", "validate the map and build page state", (), "folio"),
        Row(
            "liveupdate.prepare",
            "PREPARE with 64-byte states",
            (Limit("luo batch", "libfdt", 1 / 3), Limit("luo native", "libfdt", 1 / 3)),
            "device",
        ),
        Row(
            "liveupdate.prepare.python",
            "PREPARE with one Python callback a device, each timed",
            (Limit("luo python", "for loop", 2),),
            "device",
        ),
        Row(
            "liveupdate.reboot",
            "REBOOT outside callbacks, 1 % of the devices have one",
            (
                Limit("luo native", "PREPARE", 0.05, percent=True),
                Limit("luo python", "PREPARE", 0.05, percent=True),
            ),
            "device",
        ),
        Row(
            "liveupdate.reboot.batch",
            "REBOOT in all, one batch driver changes 1 %",
            (Limit("luo batch", "PREPARE", 0.10, percent=True),),
            "device",
        ),
        Row(
            "liveupdate.restore",
            "jump, boot and restore",
            (Limit("luo batch", "PREPARE batch", 1), Limit("luo native", "PREPARE native", 1)),
            "device",
        ),
        Row("liveupdate.processes", "jump, boot and restore between two processes", (), "device"),
        Row("liveupdate.finish", "FINISH", (), "device"),
        Row(
            "liveupdate.memory",
            "peak memory of an update beyond the image, both kernels in one process",
            (),
            "device",
        ),
        Row("callbacks.event", "an event of callbacks that do nothing", (), "callback"),
        Row(
            "memfd.preserve",
            "preserve a memfd in touched memory, contents and all",
            (Limit("luo", "file copy", 1.5),),
            "page",
        ),
        Row(
            "memfd.freeze",
            "freeze a memfd that has not changed: all of it is compared",
            (Limit("luo", "file copy", 2),),
            "page",
        ),
        Row(
            "memfd.retrieve",
            "retrieve a memfd, contents and all",
            (Limit("luo", "file copy", 1.5),),
            "page",
        ),
        Row("api.prepare", "by notifiers or by files: PREPARE, or PRESERVE of each", (), "device"),
        Row("api.reboot", "by notifiers or by files: REBOOT, or freezing all", (), "device"),
        Row("api.restore", "by notifiers or by files: restored, or retrieved each", (), "device"),
        Row("api.finish", "by notifiers or by files: FINISH", (), "device"),
        Row("api.blackout", "by notifiers or by files: blackout", (), "device"),
    )
}

#: Who the peers are, where their name alone does not say it.
PEERS = {
    "libfdt": "libfdt in C",
    "walk": "a radix walk a page in C",
    "callback walk": "a walk in C that calls back",
    "croaring": "CRoaring (pyroaring)",
    "dict": "a dict",
    "empty call": "an empty Cython method",
    "empty map": "that of an empty map",
    "chunk loop": "a loop in C",
    "for loop": "a bare for loop that calls it",
    "file copy": "a copy with preadv or pwritev",
}

#: Cost per device, at most times that at a tenth of the size; bytes a device beyond the image; and
#: nanoseconds that timing adds to a callback.
LIMITS = {"scaling": 1.5, "memory": 200.0, "timing": 40.0}
