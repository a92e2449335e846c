"""``python -m benchmarks [--quick | --long] [--only NAME ...]``: run the sections, print their tables and keep them.

A complete run is kept in ``results/``, as Markdown and as a plot of the main figures. ``--quick`` is for trying out
whether everything runs, ``--long`` takes hours.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import inspect
import os
import platform
import re
from pathlib import Path
from time import perf_counter

from benchmarks.data import table
from benchmarks.report import Section, plot

#: Each section, a module of this package, and the seconds that it should take on two idle cores: ten minutes in all.
SECTIONS = {
    "parsing": 10,
    "decoding": 15,
    "engine": 35,
    "setup_and_memory": 25,
    "scaling": 60,
    "limit": 150,
    "rates": 45,
    "recording": 25,
    "latency": 20,
    "endurance": 64,
    "gpu": 1,
    "peers": 150,
}
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


def run_section(name: str, quick: bool, long: bool) -> Section:
    """Run one section; ``long`` is for those that have more to do then."""
    work = importlib.import_module(f"benchmarks.{name}").run
    options = {"long": long} if "long" in inspect.signature(work).parameters else {}
    made = work(quick, **options)
    return made if isinstance(made, Section) else Section(made)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    scale = parser.add_mutually_exclusive_group()
    scale.add_argument("--quick", action="store_true", help="small scans, fewer repeats; not kept")
    scale.add_argument("--long", action="store_true", help="every case, scans up to 2048x2048, an hour of scanning")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=tuple(SECTIONS), help="run these; not kept")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the plot of this run there in any case (.png)")
    options = parser.parse_args()
    began, load = perf_counter(), os.getloadavg()[0]
    sections: dict[str, Section] = {}
    taken: dict[str, float] = {}
    for name in options.only:
        print(f"{name} ...", flush=True)
        before = perf_counter()
        sections[name] = run_section(name, options.quick, options.long)
        taken[name] = perf_counter() - before
        budget = "" if options.quick or options.long else f" of {SECTIONS[name]}"
        print(f"  {taken[name]:.0f}{budget} s", flush=True)
    now = datetime.date.today()
    date = f"{now.day} {now:%B %Y}"
    title = (
        f"# Benchmarks, {date}\n\n{machine()}, CPython {platform.python_version()}. Medians, from one run of "
        f"{perf_counter() - began:.0f} s; load before it {load:.1f}."
    )
    times = table(("section", "seconds", "planned"), [(name, taken[name], SECTIONS[name]) for name in sections])
    texts = [section.text for section in sections.values()]
    kept = not options.quick and set(options.only) == set(SECTIONS)
    slug = re.sub(r"[^a-z0-9]+", "-", machine().lower()).strip("-")
    path = RESULTS / f"{now.isoformat()}-{slug}{'-long' if options.long else ''}.md"
    figures = {name: rows for section in sections.values() for name, rows in section.figures.items()}
    picture = path.with_suffix(".png") if kept else None
    drawn = []
    for file in filter(None, (picture, options.plot)):
        file.parent.mkdir(exist_ok=True)
        if plot(figures, file, f"liveptycho, {machine()}, {date}"):
            drawn.append(file)
    if picture in drawn:
        texts.insert(0, f"![main figures]({picture.name})")
    report = "\n\n".join([title, *texts, f"## Time that the sections took\n\n{times}"]) + "\n"
    print(f"\n{report}")
    if kept:
        path.write_text(report, encoding="utf-8")
        drawn.insert(0, path)
    for file in drawn:
        print(f"kept in {file}")


if __name__ == "__main__":
    main()
