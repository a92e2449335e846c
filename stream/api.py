"""The Python API: what notebooks and other programs use, and what the command line is built on.

    result = stream.reconstruct("scan.h5", semiangle_mrad=20, energy_kev=200)
    result.phase, result.object, result.images["com_row"]

    async with stream.open_session("tcp://detector:31000", energy_kev=200, semiangle_mrad=20) as session:
        async for snapshot in session:
            show(snapshot.images["phase"])
            await session.change(aberrations={"C10": -80.0})

Settings are keyword arguments with the keys and units of ``stream.config.Settings``. ``channels="phase,bf"`` makes
these images only, see ``stream.snapshot.IMAGE_CHANNELS``; what is left out is not computed, and named by results and
snapshots.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stream.check import Finding, check_address
from stream.config import Layer, Settings
from stream.control import Trigger
from stream.control.choose import detector_control
from stream.files import Dataset4D, open_dataset
from stream.geometry import DetectorGeometry
from stream.kernels import METHODS, OverlapMasks, overlap_function, overlap_masks
from stream.offline import Progress, reconstruct_file
from stream.optics import Aberrations, AxesRelation, Probe
from stream.record import Recorded, record_stream
from stream.recording import Recording, open_recording
from stream.replay import replay_recording
from stream.result import Result
from stream.session import Session
from stream.session_options import SessionOptions
from stream.snapshot import Counters, Snapshot
from stream.spectra import spectrum_at

__all__ = [
    "METHODS",
    "Aberrations",
    "AxesRelation",
    "Counters",
    "Dataset4D",
    "DetectorGeometry",
    "Finding",
    "OverlapMasks",
    "Probe",
    "Recorded",
    "Recording",
    "Result",
    "Session",
    "SessionOptions",
    "Settings",
    "Snapshot",
    "check_address",
    "open_dataset",
    "open_recording",
    "open_session",
    "overlap_function",
    "overlap_masks",
    "reconstruct",
    "record_stream",
    "replay_recording",
    "spectrum_at",
]


def reconstruct(
    path: str | Path,
    *,
    config: str | Path | None = None,
    dataset: str | None = None,
    device: str = "auto",
    passes: int | None = 0,
    threads: int | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Result:
    """Reconstruct a data file or a recording.

    ``settings``: keys of ``Settings``; they win over the TOML file ``config``, and that over what the file says.
    ``dataset``: path inside an HDF5 file; ``device``: auto, cpu or gpu; ``passes`` to take from a recording, None or 0
    for all; ``threads`` for decoding and for computing; ``progress(done, total)`` is called after every block of
    frames. Raises ``LiveptychoError`` with a sentence for the user.
    """
    return reconstruct_file(
        path,
        layers(config, settings),
        dataset=dataset,
        device=device,
        passes=passes,
        progress=progress,
        threads=threads,
    )


def open_session(
    address: str | Sequence[str],
    *,
    protocol: str = "native",
    bind: bool = False,
    pattern: str = "pull",
    passes: int | None = 0,
    device: str = "auto",
    record: str | Path | None = None,
    output: str | Path | None = None,
    publish: str | None = None,
    follow: bool = False,
    linger_s: float = 0.0,
    threads: int | None = None,
    timeout_s: float | None = None,
    series_timeout_s: float | None = None,
    simplon: str | None = None,
    control: str | None = None,
    trigger: Trigger | None = None,
    count_time_s: float | None = None,
    frame_time_s: float | None = None,
    config: str | Path | None = None,
    **settings: Any,
) -> Session:
    """A live session on a detector's stream, to be used with ``async with``; see ``Session`` and ``SessionOptions``.

    ``simplon``, ``control``: where a DECTRIS or a Merlin detector is asked and, with ``trigger`` (software, pixel, line
    or gate), armed for one scan. ``settings`` and ``config`` as in :func:`reconstruct`. Raises ``LiveptychoError``.
    """
    addresses = [address] if isinstance(address, str) else list(address)
    return Session(
        SessionOptions(
            addresses,
            protocol=protocol,
            bind=bind,
            pattern=pattern,
            layers=layers(config, settings),
            passes=passes,
            device=device,
            record=None if record is None else Path(record),
            output=None if output is None else Path(output),
            publish=publish,
            follow=follow,
            linger_s=linger_s,
            threads=threads,
            timeout_s=timeout_s,
            series_timeout_s=series_timeout_s,
            control=detector_control(protocol, simplon, control),
            trigger=trigger,
            count_time_s=count_time_s,
            frame_time_s=frame_time_s,
        )
    )


def layers(config: str | Path | None, settings: dict[str, Any]) -> list[Layer]:
    """Keyword arguments over a configuration file, ready for ``reconstruct_file`` and ``SessionOptions``."""
    out = [Layer.of("argument", settings)]
    if config is not None:
        out.append(Layer.from_toml(Path(config)))
    return out
