"""NumPy or CuPy: one code path for both. Everything that touches device arrays takes its functions from here.

CuPy is optional. ``xp`` is the usual name for "the array module in use"; ``scipy.fft`` and ``cupyx.scipy.fft`` have the
same functions, so the FFTs are shared too.
"""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import scipy.fft

from detectors.errors import ConfigurationError

logger = logging.getLogger(__name__)

DEVICES = ("auto", "cpu", "gpu")


@dataclass(frozen=True)
class Device:
    """Where the arrays live: ``xp`` (numpy or cupy), ``fft`` (scipy.fft's functions for it), and a name to show."""

    xp: ModuleType
    fft: ModuleType
    name: str

    @property
    def is_gpu(self) -> bool:
        return self.xp is not np

    def to_host(self, array: Any) -> np.ndarray:
        """A NumPy array with the same content (the same object when it is on the host already)."""
        return self.xp.asnumpy(array) if self.is_gpu else array

    def free_bytes(self) -> int:
        """Memory that can still be taken on this device, in bytes."""
        if self.is_gpu:
            free, _ = self.xp.cuda.runtime.memGetInfo()
            return int(free) + int(self.xp.get_default_memory_pool().free_bytes())
        return host_free_bytes()


def host_free_bytes() -> int:
    """Available host memory in bytes, as the kernel estimates it (Linux); elsewhere an optimistic 8 GiB."""
    try:
        with open("/proc/meminfo", encoding="ascii") as meminfo:
            fields = dict(line.split(":", 1) for line in meminfo)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 8 << 30


def choose_device(name: str = "auto") -> Device:
    """The device called ``auto``, ``cpu`` or ``gpu``.

    ``auto`` takes the GPU when CuPy is installed and a device answers, else the CPU, and logs which. Raises
    ``ConfigurationError`` for an unknown name, and for ``gpu`` where there is none, with the reason.
    """
    if name not in DEVICES:
        raise ConfigurationError(f"unknown device {name!r}; choose one of {', '.join(DEVICES)}")
    if name == "cpu":
        return _CPU
    try:
        return _gpu()
    except _NoGpu as reason:
        if name == "gpu":
            raise ConfigurationError(f"no GPU can be used: {reason}; use --device cpu") from None
        logger.info("computing on the CPU: %s", reason)
        return _CPU


def namespace(array: Any) -> ModuleType:
    """The module (numpy or cupy) whose functions suit ``array``."""
    return importlib.import_module("cupy") if type(array).__module__.startswith("cupy") else np


class _NoGpu(Exception):
    pass


_CPU = Device(np, scipy.fft, "CPU")


def _gpu() -> Device:
    try:
        cupy = importlib.import_module("cupy")
    except ImportError:
        raise _NoGpu("CuPy is not installed (pip install 'liveptycho[cuda12]' or [cuda13])") from None
    try:
        properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
        fft = importlib.import_module("cupyx.scipy.fft")
        # Compiler, BLAS and FFT are libraries of their own: any may be missing where the driver answers.
        ones = cupy.ones((2, 2), np.float32)
        float(fft.rfft(ones @ ones, axis=1).real.sum())
    except Exception as error:  # CuPy raises CUDA's own error types, and ImportError for missing libraries
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise _NoGpu(f"CuPy is installed, but CUDA does not work ({reason})") from error
    name = properties["name"]
    return Device(cupy, fft, name.decode() if isinstance(name, bytes) else name)
