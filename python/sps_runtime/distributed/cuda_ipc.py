"""Memory and events of a GPU that several processes share, by CUDA's interprocess handles.

torch shares tensors between processes by pickling; here a handle is 64 bytes in a message of our
own, and memory comes from the driver itself, so that torch's allocator never owns what others map.
Ranks may stand on one GPU, which NCCL refuses.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import msgspec
import torch
from torch import Tensor

from sps_runtime.distributed.boxes import BOXES, Boxes
from sps_runtime.distributed.communicator import Communicator

HANDLE_BYTES = 64
_LAZY_PEER_ACCESS = 1


class Exported(msgspec.Struct, frozen=True):
    """What one rank lets others map.

    Attributes:
        memory: handles by name: whole allocations of the driver.
        events: handles by name.
        error: why there is nothing; empty where all went well.
    """

    memory: dict[str, bytes] = {}
    events: dict[str, bytes] = {}
    error: str = ""


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_byte * HANDLE_BYTES),)


class Driver:
    """The few calls of libcuda that torch has no names for. The calling thread's context is the one
    that torch made current.

    Raises:
        OSError: there is no driver.
    """

    def __init__(self, library: ctypes.CDLL | None = None) -> None:
        self._cuda = library or ctypes.CDLL("libcuda.so.1")

    def allocate(self, nbytes: int) -> int:
        """Address of new device memory. Raises RuntimeError when there is none."""
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(nbytes))
        return address.value

    def export(self, address: int) -> bytes:
        """The handle of an allocation."""
        handle = _Handle()
        self._call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(address))
        return bytes(handle.reserved)

    def open(self, handle: bytes) -> int:
        """The address here of another process's allocation."""
        if len(handle) != HANDLE_BYTES:
            raise ValueError(f"a handle of {len(handle)} bytes")
        address = ctypes.c_uint64()
        structure = _Handle.from_buffer_copy(handle)
        flags = ctypes.c_uint(_LAZY_PEER_ACCESS)
        self._call("cuIpcOpenMemHandle_v2", ctypes.byref(address), structure, flags)
        return address.value

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self._cuda, name)(*arguments)
        if status:
            raise RuntimeError(f"{name} fails with CUDA error {status}")


class _Span:
    """Device memory in the form in which torch takes it from others."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


def tensor_at(address: int, nbytes: int, device: torch.device) -> Tensor:
    """uint8 ``[nbytes]`` over memory that stays as long as the process."""
    return torch.as_tensor(_Span(address, nbytes), device=device)


class SharedGpu:
    """What one rank exports and what it opened of others.

    Args:
        device: this rank's, current.
        sizes: name -> bytes of the allocations to make.
        events: names of the events to make.

    Raises:
        RuntimeError: memory is short, or this machine exports none.
    """

    def __init__(
        self, device: torch.device, sizes: dict[str, int], events: Sequence[str], driver: Driver
    ) -> None:
        torch.zeros(1, device=device)  # makes the context current in this thread
        self._device, self._driver, self._sizes = device, driver, sizes
        self._opened: dict[bytes, Tensor] = {}
        self._opened_events: dict[bytes, torch.cuda.Event] = {}
        addresses = {name: driver.allocate(size) for name, size in sizes.items()}
        self.memory = {
            name: tensor_at(address, sizes[name], device) for name, address in addresses.items()
        }
        self.events = {name: torch.cuda.Event(interprocess=True) for name in events}
        self.exported = Exported(
            {name: driver.export(address) for name, address in addresses.items()},
            {name: event.ipc_handle() for name, event in self.events.items()},
        )

    def open_all(self, exported: Exported, names: Sequence[str]) -> None:
        """Open what another rank exports: its memory, and events by name.

        Raises:
            RuntimeError: this machine opens none.
        """
        for name in exported.memory:
            self.open_memory(exported, name)
        for name in names:
            self.open_event(exported, name)

    def open_memory(self, exported: Exported, name: str) -> Tensor:
        """Another rank's allocation, opened once; all ranks' of one name have one size."""
        handle = exported.memory[name]
        if handle not in self._opened:
            address = self._driver.open(handle)
            self._opened[handle] = tensor_at(address, self._sizes[name], self._device)
        return self._opened[handle]

    def open_event(self, exported: Exported, name: str) -> torch.cuda.Event:
        """Another rank's event, opened once."""
        handle = exported.events[name]
        if handle not in self._opened_events:
            event = torch.cuda.Event.from_ipc_handle(self._device, handle)
            self._opened_events[handle] = event
        return self._opened_events[handle]


def tell_all(communicator: Communicator, mine: Exported) -> list[Exported]:
    """What every member exports; a collective call over the host's links."""
    encoded = bytearray(msgspec.msgpack.encode(mine))
    sizes = _to_all(communicator, torch.tensor([len(encoded)]), [1] * communicator.size)
    lengths = [int(size) for size in sizes]
    found = _to_all(communicator, torch.frombuffer(encoded, dtype=torch.uint8), lengths)
    decoder = msgspec.msgpack.Decoder(Exported)
    return [decoder.decode(message.numpy().tobytes()) for message in found]


def _to_all(communicator: Communicator, mine: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    found = [mine.new_empty(length) for length in lengths]
    communicator.exchange([mine] * communicator.size, found, "control")
    return found


def event_name(kind: str, peer: int, box: int) -> str:
    """Of a mark that this rank makes for a peer."""
    return f"{kind}.{peer}.{box}"


def events_for(rank: int) -> list[str]:
    """The events of a peer that a rank waits for."""
    kinds = ("filled", "emptied")
    return ["fence", *(event_name(kind, rank, box) for kind in kinds for box in range(BOXES))]


def box_events(world_size: int, rank: int) -> list[str]:
    """The events that a rank's boxes need."""
    peers = [peer for peer in range(world_size) if peer != rank]
    return [event_name(k, p, b) for k in ("filled", "emptied") for p in peers for b in range(BOXES)]


class EventMoments:
    """`distributed.boxes.Moments` by interprocess events.

    Args:
        mine: this rank's events, by name.
        theirs: of each other rank those that it makes for this one.
    """

    def __init__(
        self,
        rank: int,
        mine: dict[str, torch.cuda.Event],
        theirs: dict[int, dict[str, torch.cuda.Event]],
    ) -> None:
        self._rank, self._mine, self._theirs = rank, mine, theirs

    def filled(self, peer: int, box: int) -> None:
        self._mine[event_name("filled", peer, box)].record()

    def emptied(self, peer: int, box: int) -> None:
        self._mine[event_name("emptied", peer, box)].record()

    def await_filled(self, peer: int, box: int) -> None:
        self._wait(peer, event_name("filled", self._rank, box))

    def await_emptied(self, peer: int, box: int) -> None:
        self._wait(peer, event_name("emptied", self._rank, box))

    def _wait(self, peer: int, name: str) -> None:
        torch.cuda.current_stream().wait_event(self._theirs[peer][name])


class SideStream:
    """`distributed.boxes.Side`: a CUDA stream for messages."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    @contextmanager
    def behind(self) -> Iterator[None]:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        torch.cuda.current_stream().wait_stream(self._stream)


def open_boxes(
    gpu: SharedGpu, everyone: Sequence[Exported | None], rank: int, box_bytes: int
) -> tuple[Boxes, EventMoments]:
    """The boxes of all ranks that export any.

    Args:
        everyone: by global rank; None for ranks of other hosts.
    """
    shape = (len(everyone), BOXES, box_bytes)
    theirs: list[Tensor | None] = [None] * len(everyone)
    events: dict[int, dict[str, torch.cuda.Event]] = {}
    for peer, exported in enumerate(everyone):
        if exported is None or peer == rank:
            continue
        theirs[peer] = gpu.open_memory(exported, "boxes").view(shape)
        names = [event_name(k, rank, b) for k in ("filled", "emptied") for b in range(BOXES)]
        events[peer] = {name: gpu.open_event(exported, name) for name in names}
    boxes = Boxes(gpu.memory["boxes"].view(shape), theirs)
    return boxes, EventMoments(rank, gpu.events, events)
