"""A runtime for ``stream.gpu.decode`` without a GPU: the kernels compiled for the host, and streams that play tricks.

Work in a stream is done at some random moment between the call and the last at which it may be done, as events demand:
bytes that are changed or read too early, or a stream that does not wait, give wrong results.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from stream.gpu.runtime import KERNELS

SHIM = Path(__file__).with_name("gpu_host.h")
#: Beyond everything that is allocated: bytes that nothing may write.
GUARD_BYTES = 64
GUARD = 0xA5


def signatures() -> dict[str, list[tuple[str, str]]]:
    """The parameters (type, name) of every kernel, read from the source."""
    source = KERNELS.read_text(encoding="utf-8")
    found = {}
    for name, parameters in re.findall(r'extern "C" __global__ void (\w+)\(([^)]*)\)', source.replace("\\\n", "\n")):
        split = (" ".join(parameter.split()).rpartition(" ") for parameter in parameters.split(","))
        found[name] = [(kind.strip(), parameter) for kind, _, parameter in split]
    generic = found.pop("NAME")
    for name, pixel in re.findall(r"^GATHER\((\w+), ([\w ]+)\)", source, re.MULTILINE):
        found[name] = [(kind.replace("PIXEL", pixel), parameter) for kind, parameter in generic]
    return found


def build(folder: Path, *, lanes: int = 1, flags: Sequence[str] = ()) -> Path:
    """Compile the kernels for the host; skips the test, with the reason, where that cannot be done."""
    compiler = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler is at hand to compile the GPU kernels for the host")
    calls = []
    for name, parameters in signatures().items():
        declared = ", ".join(f"{kind} {parameter}" for kind, parameter in parameters)
        given = ", ".join(parameter for _, parameter in parameters)
        calls.append(
            f'extern "C" void host_{name}(unsigned x, unsigned y, unsigned threads, {declared}) '
            f"{{ run({{x, y}}, threads, [=] {{ {name}({given}); }}); }}"
        )
    source, library = folder / "kernels.cpp", folder / "kernels.so"
    source.write_text("\n".join([f'#include "{SHIM}"', f'#include "{KERNELS}"', *calls]), encoding="utf-8")
    options = ["-std=c++20", "-O2", "-g", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-shared", "-fPIC", "-pthread"]
    built = subprocess.run(
        [compiler, *options, f"-DLANES={lanes}", *flags, str(source), "-o", str(library)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if built.returncode and ("<barrier>" in built.stderr or "cannot find" in built.stderr or "c++20" in built.stderr):
        pytest.skip(f"this compiler lacks what the test needs: {built.stderr.strip().splitlines()[0]}")
    assert built.returncode == 0, built.stderr
    return library


class Kernels:
    """The compiled kernels, to be called with NumPy arrays and scalars."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._parameters = signatures()

    def __call__(self, name: str, blocks: tuple[int, ...], threads: int, arguments: Sequence[Any]) -> None:
        parameters = self._parameters[name]
        assert len(arguments) == len(parameters), name
        given: list[Any] = []
        for (kind, parameter), value in zip(parameters, arguments, strict=True):
            if kind.endswith("*"):
                assert isinstance(value, np.ndarray), (name, parameter)
                assert value.flags.c_contiguous, (name, parameter)
                given.append(ctypes.c_void_p(value.ctypes.data))
            else:
                # CuPy passes a scalar with its own size: a wrong one would shift what follows.
                expected = {"int": np.int32, "long long": np.int64}[kind]
                assert type(value) is expected, (name, parameter, type(value))
                given.append({"int": ctypes.c_int, "long long": ctypes.c_longlong}[kind](int(value)))
        x, y = (*blocks, 1)[:2]
        assert x > 0, name
        assert y > 0, name
        getattr(self._library, f"host_{name}")(ctypes.c_uint(x), ctypes.c_uint(y), ctypes.c_uint(threads), *given)


class _Work:
    def __init__(self, do: Callable[[], None], after: list[_Work]) -> None:
        self.do, self.after, self.is_done = do, after, False


class HostEvent:
    def __init__(self, runtime: HostRuntime) -> None:
        self._runtime = runtime
        self.work: _Work | None = None

    def synchronize(self) -> None:
        self._runtime.finish(self.work)


class HostStream:
    def __init__(self, runtime: HostRuntime) -> None:
        self._runtime = runtime
        self.last: _Work | None = None

    def put(self, do: Callable[[], None], *also_after: _Work | None) -> None:
        self.last = _Work(do, [work for work in (self.last, *also_after) if work is not None])
        self._runtime.put(self.last)

    def record(self, event: HostEvent) -> None:
        event.work = self.last

    def wait_event(self, event: HostEvent) -> None:
        self.put(lambda: None, event.work)


class HostRuntime:
    """``stream.gpu.runtime.Runtime`` on the host. ``seed`` decides when work is done; None: as late as can be."""

    xp: ModuleType = np

    def __init__(self, kernels: Callable[[str, tuple[int, ...], int, Sequence[Any]], None], seed: int | None) -> None:
        self._kernels = kernels
        self._random = None if seed is None else np.random.default_rng(seed)
        self._pending: list[_Work] = []
        self._guarded: list[np.ndarray] = []
        self._current = HostStream(self)
        self.uploaded = 0
        self.launches: list[str] = []

    def put(self, work: _Work) -> None:
        self._pending.append(work)
        if self._random is not None:
            for _ in range(int(self._random.integers(3))):
                self._do_one()

    def _do_one(self) -> None:
        """Some work that is not kept waiting by other."""
        assert self._random is not None
        ready = [work for work in self._pending if all(other.is_done for other in work.after)]
        if ready:
            self._do(ready[int(self._random.integers(len(ready)))])

    def _do(self, work: _Work) -> None:
        work.do()
        work.is_done, work.after = True, []
        self._pending.remove(work)

    def finish(self, work: _Work | None) -> None:
        """Do ``work`` and what it waits for, and nothing else."""
        todo = [] if work is None or work.is_done else [work]
        while todo:
            before = [other for other in todo[-1].after if not other.is_done]
            if before:
                todo += before[:1]
            else:
                self._do(todo.pop())

    def check_guards(self) -> None:
        """Nothing was written beyond any buffer."""
        for array in self._guarded:
            assert (array[-GUARD_BYTES:] == GUARD).all()

    def pinned(self, nbytes: int) -> np.ndarray:
        return self.empty(nbytes)

    def empty(self, nbytes: int) -> np.ndarray:
        array = np.full(nbytes + GUARD_BYTES, GUARD, np.uint8)
        self._guarded.append(array)
        return array[:nbytes]

    def constant(self, array: np.ndarray) -> np.ndarray:
        return array.copy()

    def stream(self) -> HostStream:
        return HostStream(self)

    def current_stream(self) -> HostStream:
        return self._current

    def event(self) -> HostEvent:
        return HostEvent(self)

    def upload(self, stream: HostStream, to: np.ndarray, array: np.ndarray) -> None:
        assert to.nbytes == array.nbytes
        self.uploaded += array.nbytes
        stream.put(lambda: np.copyto(to, array))

    def download(self, stream: HostStream, to: np.ndarray, array: np.ndarray) -> None:
        assert to.nbytes == array.nbytes
        stream.put(lambda: np.copyto(to, array))

    def clear(self, stream: HostStream, array: np.ndarray) -> None:
        stream.put(lambda: array.fill(0))

    def launch(
        self, stream: HostStream, name: str, blocks: tuple[int, ...], threads: int, arguments: Sequence[Any]
    ) -> None:
        self.launches.append(name)
        stream.put(lambda: self._kernels(name, blocks, threads, arguments))
