"""Types of the compiled core; one section per fragment of luo/core/."""

# ---- dispatch ----


@final
class CallRecorder:
    @property
    def clock(self) -> Callable[[], int] | None: ...
    def __new__(cls, clock: Callable[[], int] | None = None) -> CallRecorder: ...
    def read_clock(self) -> int: ...
    def key(self, subsystem: str, event: str, kind: str, name: str) -> int: ...
    def add(self, key: int, ns: int, devices: int = 1) -> None: ...
    def rows(self) -> list[dict[str, Any]]: ...
    def dump(self) -> list[list[Any]]: ...
    def merge(
        self, dump: Iterable[Sequence[Any]], events: Collection[str] | None = None
    ) -> None: ...
    def clear(self) -> None: ...

class DeviceRef:
    @property
    def devices(self) -> Any: ...
    @property
    def index(self) -> int: ...
    def __new__(cls, devices: object, index: int) -> Self: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...

@final
class CallTable:
    def __new__(
        cls,
        ids: NDArray[np.int32],
        calls: list[Any],
        keys: NDArray[np.int32],
        bit: int,
        mode: str,
    ) -> CallTable: ...

def call_devices(
    recorder: CallRecorder,
    devices: object,
    device_type: type[DeviceRef],
    order: NDArray[np.int32],
    start: int,
    stop: int,
    backwards: bool,
    tables: list[CallTable],
    done: NDArray[np.uint8],
    failures: list[tuple[int, int, object]] | None,
) -> tuple[int, int, object] | None: ...
def pack_slots(
    sizes: NDArray[np.uint64], slab_bytes: int
) -> tuple[NDArray[np.int32], NDArray[np.uint64], NDArray[np.uint64]]: ...
def match_strings(
    data: NDArray[np.uint8], offsets: NDArray[np.uint64], names: list[bytes]
) -> NDArray[np.int32]: ...
def digest_slots(
    slab: memoryview | NDArray[np.uint8],
    offsets: NDArray[np.uint64],
    sizes: NDArray[np.uint64],
    owners: NDArray[np.int32],
    first: int,
    sums: NDArray[np.uint64],
    nbytes: NDArray[np.uint64],
) -> None: ...
