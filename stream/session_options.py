"""What a live session is to do, and which files it may write."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from detectors.errors import ConfigurationError, DataFileError
from stream.config import Layer
from stream.control import DetectorControl, Trigger
from stream.result import require_writable


@dataclass(frozen=True)
class SessionOptions:
    """What a session does. Times in seconds."""

    addresses: Sequence[str]
    """where the detector's stream is; several addresses share the load of one stream"""
    protocol: str = "native"
    bind: bool = False
    pattern: str = "pull"
    layers: Sequence[Layer] = ()
    """settings, in order of precedence, before what the stream says of itself"""
    passes: int | None = 0
    """how many passes to take; None for ever, 0 as many as the series announces"""
    device: str = "auto"
    record: Path | None = None
    output: Path | None = None
    """where the result of each finished series is written; from the second on with -2, -3, ... in the name"""
    publish: str | None = None
    follow: bool = False
    """wait for the next series after one has ended"""
    linger_s: float = 0.0
    """keep publishing and answering control requests for so long after the last series; ``math.inf`` until stopped"""
    timeout_s: float | None = None
    """give up when nothing came for so long before the first series"""
    series_timeout_s: float | None = None
    """take a series for ended, incomplete, when nothing came for so long in the middle of it"""
    row_timeout_s: float = 1.0
    """close open rows when nothing came for so long"""
    threads: int | None = None
    control: DetectorControl | None = None
    """the detector's control interface: asked for what the stream does not say"""
    trigger: Trigger | None = None
    """arm the detector through ``control`` for one series, begun by such triggers; None leaves that to others"""
    count_time_s: float | None = None
    frame_time_s: float | None = None
    """what an armed detector is set to; None leaves it as it is"""


def numbered(path: Path, count: int) -> Path:
    """``path`` for the first series, ``path-2`` for the second, ..., before the suffix."""
    return path if count <= 1 else path.with_name(f"{path.stem}-{count}{path.suffix}")


def make_folder(path: Path) -> None:
    """Make the folder of a recording, before a series begins. Raises ``DataFileError`` when that cannot be."""
    require_writable(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataFileError(f"cannot make the folder {path.parent}: {error.strerror}") from None


def aside(path: Path, number: int) -> Path:
    """Where the files of an aborted series go, when another one takes its place."""
    return path.with_name(f"{path.stem}-aborted-{number}{path.suffix}")


def unused_number(*paths: Path | None) -> int:
    """The first number for ``aside`` that none of these files is using."""
    return next(n for n in itertools.count(1) if not any(path and aside(path, n).exists() for path in paths))


def check_trigger(options: SessionOptions) -> None:
    """Raise ``ConfigurationError`` for settings of an armed scan that do not go together."""
    if options.trigger is None and (options.count_time_s, options.frame_time_s) != (None, None):
        raise ConfigurationError("count and frame time are set when the detector is armed from here: add --trigger")
    if options.trigger is not None and options.control is None:
        raise ConfigurationError(
            "--trigger arms the detector through its control interface: add --simplon or --control"
        )
    if options.trigger is not None and options.follow:
        raise ConfigurationError("--trigger arms the detector for one series: leave --follow out")


def check_files(options: SessionOptions) -> None:
    """Raise ``LiveptychoError`` for a recording or result that could not be written, before a scan depends on it."""
    record, output = options.record, options.output
    if record is not None and output is not None and record.absolute() == output.absolute():
        raise ConfigurationError(f"recording and result would both be {record}; choose two names")
    if record is not None and record.exists():
        raise DataFileError(
            f"{record} exists already; recordings are never overwritten: choose another name or move it"
        )
    if output is not None:
        require_writable(output)
    if record is not None:
        make_folder(record)
