"""One series from its start message to its result: find the disk if need be, make the engine, let the frames through.

Live sessions, replays and offline files all go this way. Frames that come before the disk is known are kept as they
came and caught up with afterwards.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from detectors import codec
from detectors.errors import ConfigurationError, DoesNotFit, ProtocolError
from detectors.messages import FrameBlock, SeriesStart
from stream.array import Device, host_free_bytes
from stream.calibration import Survey, find_bf_disk
from stream.config import Layer
from stream.engine import Engine
from stream.kernels import method_named
from stream.optics import Aberrations, AxesRelation, Probe
from stream.parameters import MeasuredDisk, Parameters, Resolution, load_pixel_mask
from stream.result import Result
from stream.setup import DETECTOR_PIXEL_BYTES
from stream.snapshot import IMAGE_UNITS, Counters

logger = logging.getLogger(__name__)

#: Frames that are looked at to find the bright-field disk, where the series has as many.
SURVEY_FRAMES = 256

#: ... and the most memory that they may take, decoded.
_BACKLOG_BYTES = 256 << 20


#: More positions than any scan has; beyond, even planning the memory would take minutes.
_MOST_POSITIONS = 1 << 26

#: Settings that can be changed while scanning: they decide neither which pixels nor which positions are kept.
CHANGEABLE = ("aberrations", "rotation_deg", "transpose", "method")


class Reconstruction:
    """One series. ``add`` and ``accumulate`` may run in two threads at the same time; everything else on one of them.

    ``layers``: the user's settings, in order of precedence; what ``start`` says of itself comes after them.
    ``passes``: how many to take, None for ever, 0 for as many as the series announces (one if it does not).
    ``file_mask``: bool detector shape, a pixel mask that came with the data. ``survey_only``: look at the first frames
    (``look``) and reconstruct nothing. Raises ``ConfigurationError`` when
    settings are missing or contradictory.
    """

    def __init__(
        self,
        start: SeriesStart,
        layers: Sequence[Layer],
        device: Device,
        *,
        source: str,
        passes: int | None = 0,
        file_mask: np.ndarray | None = None,
        threads: int | None = None,
        start_source: str = "stream",
        survey_only: bool = False,
    ) -> None:
        # A stream knows nothing of our files: it must not have us read any.
        own = {key: value for key, value in start.settings.items() if key not in ("pixel_mask", "positions")}
        if start.scan_shape is not None:
            own["scan_shape"] = start.scan_shape
        self.start, self.source, self._device = start, source, device
        self._file_mask, self._threads = file_mask, threads
        self._survey_only = survey_only
        self._preparing = threading.Lock()
        self._resolution = Resolution([*layers, Layer.of(start_source, own, ignore_unknown=True)])
        self._resolution.require()
        _refuse_absurd(start, self._resolution.known["scan_shape"])
        self._passes = passes
        self._backlog: list[FrameBlock] = []
        self._backlog_frames = 0
        self._unread: list[tuple[int, str]] = []
        self.engine: Engine | None = None
        self.parameters: Parameters | None = None
        self.notes = list(self._resolution.notes)
        """sentences for the user: contradictions, bad pixels, what was measured"""
        if not self._resolution.needs_disk:
            # A mistake in the settings should show before the first frame.
            self._resolution.resolve().setup(start.detector_shape, start.dtype, self._resolve_passes(), file_mask)
        for note in self.notes:
            logger.warning("%s", note)

    def close(self) -> None:
        """End the engine's threads. Results can still be taken."""
        if self.engine is not None:
            self.engine.close()

    def _resolve_passes(self) -> int | None:
        if self._passes != 0:
            return self._passes
        known = self._resolution.known
        positions = math.prod(known["scan_shape"])
        if self.start.frames is None or self.start.frames <= positions:
            return 1
        row_flyback, pass_flyback = known.get("flyback_frames_per_row", 0), known.get("flyback_frames_per_pass", 0)
        return max(1, round(self.start.frames / (positions + known["scan_shape"][0] * row_flyback + pass_flyback)))

    @property
    def needs_disk(self) -> bool:
        """Whether the first frames must be looked at before the reconstruction can begin."""
        return self._resolution.needs_disk

    def prepare(self) -> Engine:
        """Find the disk if need be, make the kernels and the engine, and catch up with the frames that waited.

        Takes up to seconds. Raises ``ConfigurationError`` (no disk can be found, ...) or ``DoesNotFit``.
        """
        with self._preparing:
            return self.engine or self._prepare()

    def _prepare(self) -> Engine:
        parameters = self.look()
        setup = parameters.setup(self.start.detector_shape, self.start.dtype, self._resolve_passes(), self._file_mask)
        engine = Engine(setup, self._device, threads=self._threads)
        if setup.passband.entries == 0:
            self._note(
                "no scan frequency of this scan lies within 2 alpha / lambda, so the phase will be empty: check "
                "scan_step_angstrom and semiangle_mrad"
            )
        self._note_frames(setup.scan.frames_per_pass, setup.passes)
        for frames, reason in self._unread:
            engine.undecodable(frames, reason)
        for block in self._backlog:
            engine.add(block)
        self._backlog, self._unread, self._backlog_frames = [], [], 0
        self.parameters, self.engine = parameters, engine
        return engine

    def look(self) -> Parameters:
        """The settings, with what the first frames tell. Raises ``ConfigurationError``."""
        return self._resolution.resolve(self._measure_disk() if self._resolution.needs_disk else None)

    @property
    def _survey_frames(self) -> int:
        """How many frames are looked at: fewer of small scans and of large frames."""
        most = max(16, _BACKLOG_BYTES // self.start.frame_bytes)
        return min(SURVEY_FRAMES, most, math.prod(self._resolution.known["scan_shape"]))

    @property
    def surveyed(self) -> bool:
        """Whether enough frames came to find the bright-field disk, if it must be found."""
        if not self._resolution.needs_disk:
            return True
        return self._backlog_frames >= self._survey_frames

    def _note_frames(self, frames_per_pass: int, passes: int | None) -> None:
        announced = self.start.frames
        if announced is not None and passes is not None and announced != frames_per_pass * passes:
            self._note(
                f"the series announces {announced} frames, but {passes} pass(es) of this scan have "
                f"{frames_per_pass * passes}; check scan_shape and the flyback frames"
            )

    def _note(self, note: str) -> None:
        logger.warning("%s", note)
        self.notes.append(note)

    def _measure_disk(self) -> MeasuredDisk:
        looked_at = 0
        survey = Survey(self.start.detector_shape, self.start.dtype, self._good())
        for block in self._backlog:
            # Exactly as many as are needed: a replay, which comes in other blocks, must find the same disk.
            count = min(len(block), self._survey_frames - looked_at)
            looked_at += count
            for offset, size in zip(block.offsets[:count], block.sizes[:count], strict=True):
                payload = block.slab[offset : offset + size]
                try:
                    frame = codec.decode(payload, block.encoding, self.start.detector_shape, self.start.dtype)
                except ProtocolError:
                    continue  # the engine will count it
                survey.add(frame[None])
        known = self._resolution.known
        if survey.frames == 0:
            raise ConfigurationError(
                "the bright-field disk could not be looked for, since no sound frame came; give bf_centre_px "
                "and bf_radius_px"
            )
        disk = survey.find(centre_px=known.get("bf_centre_px"), radius_px=known.get("bf_radius_px"))
        count = int(disk.bad_pixels.sum())
        if count:
            where = ", ".join(f"({r}, {c})" for r, c in np.argwhere(disk.bad_pixels)[:5])
            self._note(f"{count} hot or dead detector pixel(s) masked: {where}{', ...' if count > 5 else ''}")
        return MeasuredDisk(disk.centre_px, disk.radius_px, disk.bad_pixels, survey.frames)

    def _good(self) -> np.ndarray | None:
        path = self._resolution.known.get("pixel_mask")
        return self._file_mask if path is None else load_pixel_mask(Path(path))

    def add(self, block: FrameBlock) -> None:
        """Take a block of this series' frames; what it points to is not needed afterwards."""
        if self.engine is not None:
            self.engine.add(block)
            return
        self._backlog.append(block.compact())
        self._backlog_frames += len(block)
        if self.surveyed and not self._survey_only:
            self.prepare()

    def undecodable(self, frames: int, reason: str) -> None:
        """Count frames that the protocol could not read."""
        if self.engine is not None:
            self.engine.undecodable(frames, reason)
        else:
            self._unread.append((frames, reason))

    def accumulate(self) -> int:
        """Let closed rows into the image: see ``Engine.accumulate``."""
        return 0 if self.engine is None else self.engine.accumulate()

    def finish(self) -> None:
        """The series is over: everything that came is in the result now. Raises like :meth:`prepare`."""
        engine = self.prepare()
        engine.finish(self.start.frames)
        self._warn_of_bad_pixels(engine)

    def _warn_of_bad_pixels(self, engine: Engine) -> None:
        """Pixels that were not looked for, because the disk was given, may still be worth a word."""
        geometry = engine.setup.geometry
        if self._resolution.needs_disk or self._resolution.known.get("find_bad_pixels") is False:
            return
        pattern = engine.images(["mean_pattern"])["mean_pattern"].astype(np.float64)
        frames = max(1, engine.counters.received)
        disk = find_bf_disk(
            pattern, good=geometry.good, frames=frames, centre_px=geometry.bf_centre_px, radius_px=geometry.bf_radius_px
        )
        if count := int(disk.bad_pixels.sum()):
            self._note(f"{count} detector pixel(s) look hot or dead, and were used; --find-bad-pixels masks them")

    def change(self, values: dict[str, object]) -> None:
        """Other optics or another method, from the rows that are there. ``values``: keys of ``Settings``, validated.

        Before the first frames are through, they apply from the start. Raises ``ConfigurationError``.
        """
        layer = Layer.of("control", values)
        with self._preparing:
            self._resolution = self._resolution.overlaid(layer)
            if self.engine is not None and self.parameters is not None:
                self._change(self.engine, self.parameters, layer)

    def _change(self, engine: Engine, parameters: Parameters, layer: Layer) -> None:
        merged = {**parameters.values, **layer.settings.given}
        sources = {**parameters.sources, **dict.fromkeys(layer.settings.given, "control")}
        probe = Probe(
            engine.setup.probe.energy_ev,
            engine.setup.probe.semiangle,
            engine.setup.probe.rolloff,
            Aberrations.from_user(merged["aberrations"]),
            AxesRelation(math.radians(merged["rotation_deg"]), merged["transpose"]),
        )
        engine.change(probe, method_named(merged["method"]))
        self.parameters = Parameters(merged, sources, parameters.bad_pixels)

    @property
    def counters(self) -> Counters:
        """What became of the frames so far."""
        if self.engine is not None:
            return self.engine.counters
        unread = sum(frames for frames, _ in self._unread)
        return Counters(received=self._backlog_frames + unread, undecodable=unread)

    def result(self) -> Result:
        """The reconstruction as it stands. Raises like :meth:`prepare`."""
        engine = self.prepare()
        assert self.parameters is not None
        return Result(
            engine.object(),
            engine.images(IMAGE_UNITS),
            engine.positions_received,
            self.parameters,
            engine.setup,
            engine.counters,
            self.source,
            max(1, engine.passes_done),
        )


def _refuse_absurd(start: SeriesStart, scan_shape: tuple[int, int]) -> None:
    """Raise ``DoesNotFit`` for shapes that could not be worked with, before anything of their size is made."""
    rows, columns = start.detector_shape
    free = host_free_bytes()
    if math.prod(scan_shape) > _MOST_POSITIONS:
        raise DoesNotFit(
            f"a scan of {scan_shape[0]}x{scan_shape[1]} positions is more than the {_MOST_POSITIONS} that can be "
            "reconstructed; check scan_shape"
        )
    if DETECTOR_PIXEL_BYTES * rows * columns > 0.5 * free:
        raise DoesNotFit(
            f"a detector of {rows}x{columns} pixels needs about {DETECTOR_PIXEL_BYTES * rows * columns / 1e9:.1f} GB, "
            f"and {free / 1e9:.1f} GB are free: bin the detector, or use a machine with more memory"
        )
