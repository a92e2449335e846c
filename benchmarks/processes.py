"""Work in a process of its own, so that its memory is its own too, and how much that is."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from typing import Any

MB = 1e6


def apart(work: Callable[..., None], *args: Any) -> Any:
    """What ``work(pipe, *args)`` sends, from a process of its own."""
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    process = context.Process(target=work, args=(other, *args), daemon=True)
    process.start()
    other.close()
    answer = pipe.recv()
    process.join()
    return answer


def peak_bytes() -> int:
    """The most memory that this process has held so far."""
    # Not getrusage: its ru_maxrss is handed down from the process that started this one.
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def held_bytes() -> int:
    """The memory that this process holds now."""
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
