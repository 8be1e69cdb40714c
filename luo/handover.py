"""How one kernel tells the next where its data is (kho-abi 9.1, 9.2)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from luo import abi as _abi
from luo.errors import HandoverError

if TYPE_CHECKING:
    import sys

    if sys.version_info >= (3, 12):
        from collections.abc import Buffer
    else:
        from typing_extensions import Buffer

__all__ = ["Handover"]


@dataclass(frozen=True, slots=True)
class Handover:
    """All that a new kernel is told: where the root tree and the scratch array lie.

    Attributes:
        fdt_phys: physical address of the root tree.
        fdt_len: bytes to map there: the page size.
        scratch_phys: physical address of the scratch array; 0 for none.
        scratch_len: its bytes, 16 an area.
    """

    fdt_phys: int
    fdt_len: int
    scratch_phys: int
    scratch_len: int

    @property
    def numbers(self) -> tuple[int, int, int, int]:
        """The four numbers in order."""
        return (self.fdt_phys, self.fdt_len, self.scratch_phys, self.scratch_len)

    def to_setup_data(self, next_phys: int = 0) -> bytes:
        """Return the x86 setup_data node, 48 bytes (kho-abi 9.1).

        Args:
            next_phys: physical address of the next node in the list.
        """
        return _abi.SETUP_DATA_SER.pack(
            next_phys,
            _abi.SETUP_KEXEC_KHO,
            32,
            self.fdt_phys,
            self.fdt_len,
            self.scratch_phys,
            self.scratch_len,
        )

    @classmethod
    def from_setup_data(cls, node: "Buffer") -> Self:
        """Read an x86 setup_data node.

        Raises:
            HandoverError: it is too short, or not of type 10 with 32 bytes.
        """
        data = bytes(node)
        if len(data) < _abi.SETUP_DATA_SER.size:
            raise HandoverError(f"setup_data node of {len(data)} bytes: 48 are needed")
        _, kind, length, *numbers = _abi.SETUP_DATA_SER.unpack_from(data)
        if kind != _abi.SETUP_KEXEC_KHO or length != 32:
            raise HandoverError(f"setup_data node of type {kind} and length {length}: not KHO's")
        return cls(*numbers)

    def to_chosen(self, address_cells: int = 2, size_cells: int = 2) -> dict[str, bytes]:
        """Return the properties of the device tree's ``/chosen`` (kho-abi 9.2).

        Args:
            address_cells: the root's ``#address-cells``, 1 or 2.
            size_cells: the root's ``#size-cells``, 1 or 2.

        Raises:
            OverflowError: a number does not fit into its cells.
        """

        def cells(phys: int, nbytes: int) -> bytes:
            return phys.to_bytes(4 * address_cells, "big") + nbytes.to_bytes(4 * size_cells, "big")

        return {
            _abi.CHOSEN_FDT: cells(self.fdt_phys, self.fdt_len),
            _abi.CHOSEN_SCRATCH: cells(self.scratch_phys, self.scratch_len),
        }

    @classmethod
    def from_chosen(
        cls, properties: Mapping[str, "Buffer"], address_cells: int = 2, size_cells: int = 2
    ) -> Self:
        """Read the properties of ``/chosen``.

        Raises:
            HandoverError: one is missing, or is not exactly one address and size.
        """
        numbers: list[int] = []
        for name in (_abi.CHOSEN_FDT, _abi.CHOSEN_SCRATCH):
            if name not in properties:
                raise HandoverError(f"/chosen has no {name}")
            value = bytes(properties[name])
            if len(value) != 4 * (address_cells + size_cells):
                raise HandoverError(f"/chosen/{name} has {len(value)} bytes: not one entry")
            split = 4 * address_cells
            numbers += int.from_bytes(value[:split], "big"), int.from_bytes(value[split:], "big")
        return cls(*numbers)
