"""How a job is measured, the same in every environment: the standard library only.

The scripts beside this one run in processes and sessions of their own, as ``python script.py '{"json": "arguments"}'``,
and answer with one line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

_TICKS = os.sysconf("SC_CLK_TCK")
_CHILD_TIMES = slice(11, 15)
_SESSION = 3


def arguments() -> dict[str, Any]:
    """What the script was asked to do."""
    return json.loads(sys.argv[1])


def answer(**values: Any) -> None:
    """The script's answer, its last line on stdout."""
    print(json.dumps(values), flush=True)


def session_cpu_seconds() -> float:
    """CPU time [s] that all processes of this session have taken, those that have ended among them."""
    session, ticks = os.getsid(0), 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name, in parentheses, may hold spaces.
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[_SESSION]) == session:
            ticks += sum(map(int, fields[_CHILD_TIMES]))
    return ticks / _TICKS


def peak_bytes() -> int:
    """This process' high-water mark of resident memory. Not getrusage: its ru_maxrss is handed down to children."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))


class Job:
    """Measures what runs inside ``with Job() as job``: ``seconds``, ``cpu_s``, ``peak_bytes`` (VmHWM)."""

    seconds = cpu_s = 0.0
    peak_bytes = 0

    def __enter__(self) -> Job:
        # "5" sets the high-water mark back to what is resident now.
        Path("/proc/self/clear_refs").write_text("5")
        self._cpu, self._began = session_cpu_seconds(), time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds = time.perf_counter() - self._began
        self.cpu_s = session_cpu_seconds() - self._cpu
        self.peak_bytes = peak_bytes()
