"""``python -m benchmarks [--quick] [--only NAME ...]``: run them, print the tables, and keep them in ``results/``."""

from __future__ import annotations

import argparse
import datetime
import importlib
import os
import platform
import re
from pathlib import Path
from time import perf_counter

NAMES = ("parsing", "engine", "end_to_end", "latency", "setup_and_memory")
RESULTS = Path(__file__).parent / "results"


def machine() -> str:
    """The processor and how many of its cores we have: no host name."""
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="ascii").splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return f"{model}, {len(os.sched_getaffinity(0))} cores"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small scans, fewer repeats; not kept")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="run these; not kept")
    options = parser.parse_args()
    began, load = perf_counter(), os.getloadavg()[0]
    sections = []
    for name in options.only:
        print(f"{name} ...", flush=True)
        sections.append(importlib.import_module(f"benchmarks.{name}").run(options.quick))
    date = datetime.date.today().isoformat()
    title = (
        f"# Benchmarks, {date}\n\n{machine()}, CPython {platform.python_version()}. Medians, from one run of "
        f"{perf_counter() - began:.0f} s; load before it {load:.1f}."
    )
    report = "\n\n".join([title, *sections]) + "\n"
    print(report)
    if not options.quick and tuple(options.only) == NAMES:
        RESULTS.mkdir(exist_ok=True)
        slug = re.sub(r"[^a-z0-9]+", "-", machine().lower()).strip("-")
        path = RESULTS / f"{date}-{slug}.md"
        path.write_text(report, encoding="utf-8")
        print(f"kept in {path.relative_to(RESULTS.parent.parent)}")


if __name__ == "__main__":
    main()
