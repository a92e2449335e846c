"""The same scans through liveptycho, LiberTEM with ptychography40's SSB_UDF, and py4DSTEM's SSB: time, CPU, memory.

Each program runs in a process and, the peers, in an environment of its own (``make .peers/libertem/.done
.peers/py4dstem/.done``); all of them map the same file, which is in the page cache. A program that is not there, or
fails, is a line of the report. Each job is measured after a small one has imported and compiled everything.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import data
from benchmarks.peers.processes import ENVIRONMENTS, PeerFailed, ask, problem_with, running
from benchmarks.peers.streams import save_v1_stream
from benchmarks.report import Section
from stream.optics import electron_wavelength

#: scan side, detector side
QUICK = ((32, 96),)
CASES = ((32, 96), (128, 96), (128, 128))
LONG = ((32, 128), (256, 96), (256, 128))
#: ... of those, the ones that are streamed as well.
LIVE_QUICK, LIVE, LIVE_LONG = ((32, 96),), ((128, 128),), ((256, 128),)

#: Ratios that are to be reached, by scan side.
GOALS = {
    "LiberTEM offline": {128: 40, 256: 100},
    "LiberTEM live": {128: 15, 256: 50},
    "py4DSTEM": {128: 100, 256: 100},
    "py4DSTEM memory": {128: 10, 256: 10},
}
FIRST_IMAGE_GOAL_S = 1.0

_SMALL = (16, 16)
_TIMEOUT_S, _LONG_TIMEOUT_S = 120.0, 1200.0
_V1, _V2 = "libertem-live's sender, Stream V1", "own sender, Stream V2"
_OURS, _LIBERTEM, _PY4DSTEM = "liveptycho", "LiberTEM", "py4DSTEM"

Figures = dict[str, Any]


def figures(quick: bool, long: bool = False) -> list[Figures]:
    """Every measurement, as plain data.

    ``kind`` (offline, live, agreement), ``program``, ``scan``, ``detector`` (sides), ``optics``. Times in s:
    ``setup_s`` of masks, kernels or preprocessing, ``run_s`` without and ``whole_s`` with them, ``cpu_s`` of all
    processes of the program, ``first_image_s`` after the command to send. ``peak_bytes``, and ``beyond_bytes``, the
    same without the mapped data. ``note`` says why the others are missing.
    """
    out: list[Figures] = []
    problems = {name: problem_with(name) for name in ENVIRONMENTS}
    # Beside the environments: a folder in memory would count as memory.
    beside = Path(__file__).parents[2] / ".peers"
    beside.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=beside) as folder:
        timeout = _LONG_TIMEOUT_S if long else _TIMEOUT_S
        bench = _Bench(Path(folder), problems, timeout)
        cases = QUICK if quick else CASES + LONG if long else CASES
        live = LIVE_QUICK if quick else LIVE + LIVE_LONG if long else LIVE
        for side, detector in cases:
            for figure in bench.case(side, detector, (side, detector) in live):
                out.append(figure)
                _say(figure)
    return out


class _Bench:
    """The cases of one run, with their files in ``folder``."""

    def __init__(self, folder: Path, problems: dict[str, str], timeout_s: float) -> None:
        self._folder, self._problems, self._timeout = folder, problems, timeout_s

    def case(self, side: int, detector: int, live: bool) -> Iterator[Figures]:
        """Measure one scan with everything there is. ``live``: as a stream as well."""
        scan, shape = (side, side), (detector, detector)
        for left in self._folder.iterdir():
            left.unlink()
        path = self._folder / "scan.npy"
        data.save_scan(path, scan, shape)
        small = self._folder / "small.npy"
        np.save(small, np.load(path, mmap_mode="r")[: _SMALL[0], : _SMALL[1]])
        settings = data.scan_settings(scan, shape)
        del settings["scan_shape"]
        asked = {
            "data": str(path), "small": str(small), "small_scan": _SMALL, "scan": scan, "detector": shape,
            "optics": settings,
        }  # fmt: skip
        what = {"scan": side, "detector": detector}
        for optics, aberrations in (("in focus", {}), ("aberrated", data.ABERRATIONS)):
            name = f"ours {optics}"
            yield self._measured(
                name, "ours_offline", None, {**asked, "aberrations": aberrations},
                {"kind": "offline", "program": _OURS, "optics": optics, **what},
            )  # fmt: skip
        for program, script, environment in (
            (_LIBERTEM, "libertem_offline", "libertem"),
            (_PY4DSTEM, "py4dstem_offline", "py4dstem"),
        ):
            yield self._measured(
                program, script, environment, asked,
                {"kind": "offline", "program": program, "optics": "in focus", **what},
            )  # fmt: skip
        if live:
            yield from self._live(path, asked, what)
        yield from self._agreement(side, what)

    def _measured(self, name: str, script: str, environment: str | None, asked: Figures, figure: Figures) -> Figures:
        if environment is not None and self._problems[environment]:
            return {**figure, "note": self._problems[environment]}
        try:
            return {**figure, **ask(script, environment, self._timeout, **asked, out=str(self._saved(name)))}
        except PeerFailed as error:
            return {**figure, "note": str(error)}

    def _saved(self, name: str) -> Path:
        return self._folder / f"{name}.npy"

    def _live(self, path: Path, asked: Figures, what: Figures) -> Iterator[Figures]:
        figure = {"kind": "live", "optics": "in focus", **what}
        ours_v2 = {**figure, "program": _OURS, "sender": _V2}
        yield self._measured("ours live V2", "ours_live", None, asked, ours_v2)
        stream = self._folder / "stream.v1"
        asked = {**asked, "largest_frame": save_v1_stream(stream, np.load(path, mmap_mode="r"))}
        for program, name, script, environment in (
            (_OURS, "ours live V1", "ours_live", None),
            (_LIBERTEM, "LiberTEM live", "libertem_live_dectris", "libertem"),
        ):
            row = {**figure, "program": program, "sender": _V1}
            if self._problems["libertem"]:
                yield {**row, "note": self._problems["libertem"]}
                continue
            try:
                with running("dectris_sim", "libertem", stream=str(stream)) as simulator:
                    ports = simulator.answer(self._timeout)
                    yield self._measured(name, script, environment, {**asked, **ports}, row)
            except PeerFailed as error:
                yield {**row, "note": str(error)}

    def _agreement(self, side: int, what: Figures) -> Iterator[Figures]:
        """Our phase against that of each peer that has one, as it is and like for like."""
        if not self._saved("ours in focus").exists():
            return
        ours = np.load(self._saved("ours in focus"))
        for name, like in (
            (_LIBERTEM, libertem_objects),
            (_PY4DSTEM, py4dstem_objects),
            ("LiberTEM live", libertem_objects),
            ("ours live V1", own_objects),
            ("ours live V2", own_objects),
        ):
            saved = self._saved(name)
            if not saved.exists():
                continue
            theirs, undone, how = like(np.load(saved))
            yield {
                "kind": "agreement", "program": name, **what, "optics": "in focus", "how": how,
                **dict(zip(("correlation", "slope"), against(ours, theirs), strict=True)),
                **dict(zip(("like_correlation", "like_slope"), against(ours, undone), strict=True)),
            }  # fmt: skip


def against(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """(correlation of the two objects' phases, slope of ours over theirs)."""
    a, b = (np.angle(image).astype(np.float64) for image in (ours, theirs))
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())), float((a * b).sum() / (b * b).sum())


def transfer(side: int) -> np.ndarray:
    """T of SSB's phase at each scan frequency of a square scan, in focus: 2 [L(t) - L(2t)], t = |Q| lambda / alpha.

    L is the overlap of two disks of unit area. T multiplies the phase where the sidebands' pixels are summed, as in
    py4DSTEM and here; 1 at Q = 0, so that the mean stays. Source: Yang et al., Ultramicroscopy 151 (2015) 232.
    """
    frequency = np.fft.fftfreq(side, data.STEP_ANGSTROM)
    unit = electron_wavelength(data.ENERGY_KEV * 1e3) / (data.SEMIANGLE_MRAD * 1e-3)
    t = np.hypot(frequency[:, None], frequency) * unit

    def overlap(t: np.ndarray) -> np.ndarray:
        half = np.minimum(t / 2, 1)
        return 2 / np.pi * (np.arccos(half) - half * np.sqrt(1 - half * half))

    out = 2 * (overlap(t) - overlap(2 * t))
    out[0, 0] = 1
    return out


def libertem_objects(spectrum: np.ndarray) -> tuple[np.ndarray, np.ndarray, str]:
    """(its object, the same with the sums in place of its means, what that means)."""
    weighted = np.fft.ifft2(spectrum * transfer(len(spectrum)))
    return np.fft.ifft2(spectrum), weighted, "its mean over each sideband taken times the sideband's area"


def py4dstem_objects(stored: np.ndarray) -> tuple[np.ndarray, np.ndarray, str]:
    """(its object, the same relative to its own mean, what that means)."""
    # The amplitude is stored as 2 - |O|.
    linear = (2 - np.abs(stored)) * np.exp(1j * np.angle(stored))
    mean = float(linear.mean().real)
    undone = 1 + 1j * linear.imag
    return stored, undone, f"its mean, {mean:.3f}, set to 1: it divides by all counts, and sums those in its crop"


def own_objects(stored: np.ndarray) -> tuple[np.ndarray, np.ndarray, str]:
    """The same twice: nothing to undo."""
    return stored, stored, "nothing to undo: the offline result is compared with"


def run(quick: bool, long: bool = False) -> Section:
    """The section of the report; ``long`` with the 256x256 scans, which take a quarter of an hour."""
    measured = figures(quick, long)
    return Section(section(measured), {"peers": measured})


def section(measured: list[Figures]) -> str:
    """The Markdown section of these figures."""
    tables = [
        f"### Whole jobs from memory\n\n{_offline_table(measured)}",
        f"### Live\n\n{_live_table(measured)}",
        f"### Ratios\n\n{_ratio_tables(measured)}",
        f"### Agreement of the phase images with ours\n\n{_agreement_table(measured)}",
    ]
    versions = {name: value for figure in measured for name, value in figure.get("versions", {}).items()}
    notes = [
        f"Peers: {', '.join(f'{name} {value}' for name, value in sorted(versions.items())) or 'none is installed'}.",
        "Frames are u8, a disk of 20 px radius, 1,000 electrons a pattern. *set-up*: kernels, masks or preprocessing; "
        "*run*: everything from the first frame on; *whole job*: both, by the public function. Memory: VmHWM of the "
        "main process, which includes the mapped data, and without them. LiberTEM runs with the faster of its "
        "executors `threads` and `inline`; ours and py4DSTEM with their defaults.",
        "Live times count from the command to send to the finished image; sender and receiver share the cores. "
        "LiberTEM's masks are there before the command, our kernels are made after it.",
    ]
    failed = [
        f"- {figure['program']} {figure['kind']}, {figure['scan']}x{figure['scan']}, detector {figure['detector']}: "
        f"{figure['note']}"
        for figure in measured
        if "note" in figure
    ]
    missing = ["Not measured:\n\n" + "\n".join(failed)] if failed else []
    return "\n\n".join(["## Against peers", *notes, *missing, *tables])


def _offline_table(measured: list[Figures]) -> str:
    rows = []
    for figure in _of(measured, kind="offline"):
        frames = figure["scan"] ** 2
        rows.append((
            _size(figure), _name(figure), figure["optics"], figure["setup_s"], figure["run_s"], figure["whole_s"],
            frames / figure["run_s"], frames / figure["whole_s"], figure["cpu_s"], figure["peak_bytes"] / 1e6,
            figure["beyond_bytes"] / 1e6,
        ))  # fmt: skip
    head = ("scan, detector", "program", "optics", "set-up, s", "run, s", "whole job, s", "frames/s, run",
            "frames/s, whole", "CPU, s", "peak, MB", "without the data, MB")  # fmt: skip
    return data.table(head, rows)


def _live_table(measured: list[Figures]) -> str:
    rows = [
        (_size(figure), figure["program"], figure["sender"], figure["scan"] ** 2 / figure["run_s"],
         figure["first_image_s"], figure["cpu_s"])
        for figure in _of(measured, kind="live")
    ]  # fmt: skip
    return data.table(("scan, detector", "program", "sender", "frames/s", "first image, s", "CPU, s"), rows)


#: The two ways ours is run, by kind: what tells them apart, and how they are headed. Goals are judged by the first.
_WAYS = {
    "offline": ("optics", "in focus", "aberrated"),
    "live": ("sender", _V1, _V2),
}


def _ratios(measured: list[Figures], kind: str, compared: Sequence[tuple[str, str, str, str, float]]) -> str:
    """A table of theirs/ours; ``compared``: (peer, what, key of the figure, key of the goal, unit)."""
    way, *names = _WAYS[kind]
    rows = []
    for peer, what, key, goal, unit in compared:
        for theirs in _of(measured, kind=kind, program=peer):
            same = {"kind": kind, "program": _OURS, "scan": theirs["scan"], "detector": theirs["detector"]}
            cells: list[float] = []
            for name in names:
                found = _of(measured, **same, **{way: name})
                ours = found[0][key] if found else float("nan")
                cells += [ours / unit, theirs[key] / ours]
            aim = GOALS.get(goal, {}).get(theirs["scan"])
            verdict = ("–", "–") if aim is None else (aim, "yes" if cells[1] >= aim else "no")
            rows.append((f"{peer}: {what}", _size(theirs), theirs[key] / unit, *cells, *verdict))
    head = ("against", "scan, detector", "theirs", f"ours, {names[0]}", "theirs/ours", f"ours, {names[1]}",
            "theirs/ours", "goal", "met")  # fmt: skip
    return data.table(head, rows)


def _ratio_tables(measured: list[Figures]) -> str:
    offline = _ratios(measured, "offline", (
        (_LIBERTEM, "run, s", "run_s", "LiberTEM offline", 1),
        (_LIBERTEM, "whole job, s", "whole_s", "LiberTEM offline", 1),
        (_PY4DSTEM, "whole job, CPU s", "cpu_s", "py4DSTEM", 1),
        (_PY4DSTEM, "whole job, s", "whole_s", "py4DSTEM", 1),
        (_PY4DSTEM, "peak memory, MB", "peak_bytes", "py4DSTEM memory", 1e6),
        (_PY4DSTEM, "memory without the data, MB", "beyond_bytes", "py4DSTEM memory", 1e6),
    ))  # fmt: skip
    live = _ratios(measured, "live", (
        (_LIBERTEM, "whole scan, s", "run_s", "LiberTEM live", 1),
        (_LIBERTEM, "CPU, s", "cpu_s", "", 1),
        (_LIBERTEM, "first image, s", "first_image_s", "", 1),
    ))  # fmt: skip
    first = [
        f"{figure['first_image_s']:.2f} s ({_size(figure)}, {figure['sender']})"
        for figure in _of(measured, kind="live", program=_OURS)
    ]
    goal = (
        f"Goal: our first image within {FIRST_IMAGE_GOAL_S:g} s of the first frame; measured, from the command to send"
    )
    return f"{offline}\n\n{live}\n\n{goal}: {', '.join(first) or '–'}."


def _agreement_table(measured: list[Figures]) -> str:
    rows = [
        (figure["program"], _size(figure), *(f"{figure[key]:.4f}" for key in (
            "correlation", "slope", "like_correlation", "like_slope")), figure["how"])
        for figure in _of(measured, kind="agreement")
    ]  # fmt: skip
    head = ("image", "scan, detector", "correlation", "slope, ours/theirs", "like for like: correlation", "slope",
            "what was undone")  # fmt: skip
    return data.table(head, rows)


def _of(measured: list[Figures], **wanted: object) -> list[Figures]:
    return [
        figure
        for figure in measured
        if "note" not in figure and all(figure[key] == value for key, value in wanted.items())
    ]


def _size(figure: Figures) -> str:
    return f"{figure['scan']}x{figure['scan']}, {figure['detector']}x{figure['detector']}"


def _name(figure: Figures) -> str:
    return f"{figure['program']} ({figure['executor']})" if "executor" in figure else figure["program"]


def _say(figure: Figures) -> None:
    words = [f"  {figure['kind']} {figure['program']}, {_size(figure)}, {figure['optics']}:"]
    if "note" in figure:
        words.append(figure["note"])
    elif figure["kind"] == "agreement":
        words.append(f"r = {figure['like_correlation']:.4f}, slope {figure['like_slope']:.4f}")
    else:
        words.append(f"{figure['scan'] ** 2 / figure.get('whole_s', figure['run_s']):,.0f} frames/s")
    print(*words, flush=True)
