"""What is asked of CUDA, and nothing else: buffers, copies, kernels, and their order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np

KERNELS = Path(__file__).with_name("kernels.cu")


class Event(Protocol):
    """A point in a stream's work."""

    def synchronize(self) -> None:
        """Wait until the stream has come past the point where this was recorded last."""
        ...


class Stream(Protocol):
    """A queue of work: what is in it happens in order, and at the same time as what is in others."""

    def record(self, event: Any) -> Any:
        """Let ``event`` be the end of the work that is in the queue now."""
        ...

    def wait_event(self, event: Any) -> Any:
        """What comes into the queue from now on waits for ``event`` as recorded last, if it ever was."""
        ...


class Runtime(Protocol):
    """A device. Copies and kernels return at once; host memory of a copy is pinned and not touched until it is done."""

    xp: ModuleType
    """whose arrays the device's are"""

    def pinned(self, nbytes: int) -> np.ndarray:
        """Host memory that the device can copy from and to by itself, uint8 (nbytes,)."""
        ...

    def empty(self, nbytes: int) -> Any:
        """Device memory, uint8 (nbytes,)."""
        ...

    def constant(self, array: np.ndarray) -> Any:
        """A copy of ``array`` on the device, complete when this returns."""
        ...

    def stream(self) -> Stream:
        """A queue of its own, independent of all others."""
        ...

    def current_stream(self) -> Stream:
        """The queue that the array module's functions use in this thread."""
        ...

    def event(self) -> Event: ...

    def upload(self, stream: Stream, to: Any, array: np.ndarray) -> None:
        """Copy ``array`` to the device; both sides contiguous, of equally many bytes."""
        ...

    def download(self, stream: Stream, to: np.ndarray, array: Any) -> None:
        """Copy ``array`` from the device; both sides contiguous, of equally many bytes."""
        ...

    def clear(self, stream: Stream, array: Any) -> None:
        """Set every byte to 0."""
        ...

    def launch(
        self, stream: Stream, name: str, blocks: tuple[int, ...], threads: int, arguments: Sequence[Any]
    ) -> None:
        """Run a kernel of ``kernels.cu``. Arguments: device arrays, and NumPy scalars of the parameters' types."""
        ...


class CupyRuntime:
    """The device that CuPy uses. Compiles the kernels; raises CuPy's errors where that fails."""

    def __init__(self, cupy: Any) -> None:
        self.xp = cupy
        self._runtime = cupy.cuda.runtime
        self._module = cupy.RawModule(code=KERNELS.read_text(encoding="utf-8"), options=("--std=c++14",))
        self._kernels: dict[str, Any] = {}

    def pinned(self, nbytes: int) -> np.ndarray:
        return np.frombuffer(self.xp.cuda.alloc_pinned_memory(nbytes), np.uint8, nbytes)

    def empty(self, nbytes: int) -> Any:
        array = self.xp.empty(nbytes, np.uint8)
        # CuPy hands memory out again that work of the current stream may still be using.
        self.current_stream().synchronize()
        return array

    def constant(self, array: np.ndarray) -> Any:
        copy = self.xp.array(array)
        self.current_stream().synchronize()
        return copy

    def stream(self) -> Any:
        return self.xp.cuda.Stream(non_blocking=True)

    def current_stream(self) -> Any:
        return self.xp.cuda.get_current_stream()

    def event(self) -> Any:
        # A waiting thread sleeps: receiver and decoder have better use for its core.
        return self.xp.cuda.Event(block=True, disable_timing=True)

    def upload(self, stream: Any, to: Any, array: np.ndarray) -> None:
        kind = self._runtime.memcpyHostToDevice
        self._runtime.memcpyAsync(to.data.ptr, array.ctypes.data, array.nbytes, kind, stream.ptr)

    def download(self, stream: Any, to: np.ndarray, array: Any) -> None:
        kind = self._runtime.memcpyDeviceToHost
        self._runtime.memcpyAsync(to.ctypes.data, array.data.ptr, array.nbytes, kind, stream.ptr)

    def clear(self, stream: Any, array: Any) -> None:
        self._runtime.memsetAsync(array.data.ptr, 0, array.nbytes, stream.ptr)

    def launch(self, stream: Any, name: str, blocks: tuple[int, ...], threads: int, arguments: Sequence[Any]) -> None:
        kernel = self._kernels.get(name)
        if kernel is None:
            kernel = self._kernels[name] = self._module.get_function(name)
        with stream:
            kernel(blocks, (threads,), tuple(arguments))
