"""Wrong use of Kho by a Python program is an exception, never a crash or another block."""

import errno

import numpy as np
import pytest

from luo.kho import Incoming, Kho
from luo.memory import PhysicalMemory


@pytest.mark.parametrize(
    "call",
    [
        lambda incoming: incoming.restore_folio(0),
        lambda incoming: incoming.restore_folios(np.zeros(1, np.uint64)),
        lambda incoming: incoming.restore_pages(0, 1),
        lambda incoming: incoming.restore_free(0),
        lambda incoming: incoming.unrestored(),
        lambda incoming: incoming.install(),
    ],
)
def test_restore_on_an_uninitialised_incoming_is_einval(call):
    """An object whose __init__ never ran has no memory to restore from."""
    with pytest.raises(OSError, match="incoming") as error:
        call(Incoming.__new__(Incoming))

    assert error.value.errno == errno.EINVAL


def test_uninitialised_incoming_holds_nothing():
    """Nor does it hold a block."""
    incoming = Incoming.__new__(Incoming)

    assert incoming.order_of(0) is None
    assert not incoming.is_preserved(0, 4096)
    assert incoming.nr_unrestored == 0


@pytest.mark.parametrize(
    "orders", [np.array([256, 0], np.uint16), np.array([0.5, 0]), [-1, 0], [64, 0]]
)
def test_preserve_folios_with_impossible_orders_is_refused(orders):
    """Orders are never cut down to eight bits, or to integers."""
    memory = PhysicalMemory("64MiB")
    kho = Kho(memory, scratch=[])
    before = kho.nr_preserved

    with pytest.raises(ValueError, match="orders"):
        kho.preserve_folios(memory.alloc_folios(2, 0), orders)

    assert before == kho.nr_preserved
