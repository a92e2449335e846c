"""One series from its start message to its result: find the disk if need be, make the engine, let the frames through.

Live sessions, replays and offline files all go this way. Frames that come before the disk is known are kept as they
came and caught up with afterwards.
"""

from __future__ import annotations

import logging
import math
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from detectors import codec
from detectors.errors import ConfigurationError, DoesNotFit, LiveptychoError, ProtocolError
from detectors.messages import FrameBlock, SeriesStart
from stream.array import Device, host_free_bytes
from stream.calibration import Survey, find_bf_disk
from stream.channels import choose_channel
from stream.config import Layer, Settings
from stream.engine import Engine
from stream.kernels import method_named
from stream.parameters import MeasuredDisk, Parameters, Resolution, good_pixels
from stream.result import Result
from stream.scan import ScanPattern
from stream.setup import DETECTOR_PIXEL_BYTES, Setup
from stream.snapshot import Counters

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
    A pixel is used where both ``start.pixel_mask`` and the user's mask call it good. ``survey_only``: look at the first
    frames (``look``) and reconstruct nothing. ``live``: frames need not wait for the kernels (see ``Engine``). Raises
    ``ConfigurationError`` when settings are missing or contradictory.
    """

    def __init__(
        self,
        start: SeriesStart,
        layers: Sequence[Layer],
        device: Device,
        *,
        source: str,
        passes: int | None = 0,
        threads: int | None = None,
        start_source: str = "stream",
        survey_only: bool = False,
        live: bool = False,
    ) -> None:
        # A stream knows nothing of our files: it must not have us read any. Nor does it choose what the user gets.
        own = {k: value for k, value in start.settings.items() if k not in ("pixel_mask", "positions", "channels")}
        if start.scan_shape is not None:
            own["scan_shape"] = start.scan_shape
        self.start, self.source, self._device = start, source, device
        self._threads, self._survey_only, self._live = threads, survey_only, live
        self._preparing = threading.Lock()
        self._resolution = Resolution([*layers, Layer.of(start_source, own, ignore_unknown=True)], start.frames)
        self._resolution.require()
        _refuse_absurd(start, self._resolution.known["scan_shape"])
        self._passes = passes
        self._pick = choose_channel(start.channels, self._resolution.known.get("channel"))
        self._backlog: list[FrameBlock] = []
        self._backlog_frames = 0
        self._unread: list[tuple[int, str]] = []
        self.engine: Engine | None = None
        self.parameters: Parameters | None = None
        self.notes = list(self._resolution.notes)
        """sentences for the user: contradictions, bad pixels, what was measured"""
        self.notes += _notes_on(start, self._resolution.known)
        if not self._resolution.needs_disk:
            # A mistake in the settings should show before the first frame.
            self._setup(self._resolution.resolve())
        for note in self.notes:
            logger.warning("%s", note)

    def close(self) -> None:
        """End the engine's threads. Results can still be taken."""
        if self.engine is not None:
            self.engine.close()

    def _setup(self, parameters: Parameters) -> Setup:
        start = self.start
        setup = parameters.setup(start.detector_shape, start.dtype, self._resolve_passes(), start.pixel_mask)
        return replace(setup, maximum_is_masked=start.maximum_is_masked)

    def _resolve_passes(self) -> int | None:
        if self._passes != 0:
            return self._passes
        known = self._resolution.known
        positions = math.prod(known["scan_shape"])
        frames = 0 if self.start.frames is None else self.start.frames - known.get("start_offset", 0)
        if frames <= positions:
            return 1
        row_flyback, pass_flyback = known.get("flyback_frames_per_row", 0), known.get("flyback_frames_per_pass", 0)
        return max(1, round(frames / (positions + known["scan_shape"][0] * row_flyback + pass_flyback)))

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
        setup = self._setup(parameters)
        engine = Engine(setup, self._device, threads=self._threads, in_background=self._live)
        if "phase" in setup.channels and setup.passband.entries == 0:
            self._note(
                "no scan frequency of this scan lies within 2 alpha / lambda, so the phase will be empty: check "
                "scan_step_angstrom and semiangle_mrad"
            )
        if engine.plan.block_bytes is not None:
            self._note(
                "the kernels would take too much memory at a time, so they are made in blocks: the phase is renewed "
                "every so often, with all rows that came by then, and no frame waits for it"
            )
        self._note_frames(setup.scan, setup.passes)
        for frames, reason in self._unread:
            engine.undecodable(frames, reason)
        try:
            for block in self._backlog:
                engine.add(block)
        except LiveptychoError:
            engine.close()
            raise
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

    def _note_frames(self, scan: ScanPattern, passes: int | None) -> None:
        announced = self.start.frames
        if announced is None or passes is None or scan.rows_by_time:
            return
        expected = scan.frames_in(passes)
        # Where the first triggers were missed, the detector still counts on as many.
        if announced not in range(expected, max(expected, passes * scan.frames_per_pass) + 1):
            self._note(
                f"the series announces {announced} frames, but {passes} pass(es) of this scan have {expected}; check "
                + ("scan_shape and the flyback frames" if scan.start_offset == 0 else "scan_shape and start_offset")
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
            for number in range(count):
                try:
                    survey.add(self._counts(block, number)[None])
                except ProtocolError:
                    continue  # the engine will count it
        known = self._resolution.known
        if survey.frames == 0:
            if not self.counters.received:
                raise ConfigurationError("the series ended before any frame came")
            last = f"; the last one: {self._unread[-1][1]}" if self._unread else ""
            raise ConfigurationError(f"no sound frame came, {self.counters.received} could not be read{last}")
        disk = survey.find(centre_px=known.get("bf_centre_px"), radius_px=known.get("bf_radius_px"))
        count = int(disk.bad_pixels.sum())
        if count:
            where = ", ".join(f"({r}, {c})" for r, c in np.argwhere(disk.bad_pixels)[:5])
            self._note(f"{count} hot or dead detector pixel(s) masked: {where}{', ...' if count > 5 else ''}")
        return MeasuredDisk(disk.centre_px, disk.radius_px, disk.bad_pixels, survey.frames)

    def _counts(self, block: FrameBlock, number: int) -> np.ndarray:
        """One frame as the engine sees it. Raises ``ProtocolError`` when it cannot be unpacked."""
        frame = self._decoded(block, number)
        none = frame == np.iinfo(frame.dtype).max if self.start.maximum_is_masked else np.zeros(frame.shape, bool)
        if block.minus is not None:
            other = self._decoded(block.minus, number)
            none |= (other > frame) | (self.start.maximum_is_masked & (other == np.iinfo(other.dtype).max))
            frame = frame - other
        return np.where(none, frame.dtype.type(0), frame)

    def _decoded(self, block: FrameBlock, number: int) -> np.ndarray:
        start, offset, size = self.start, block.offsets[number], block.sizes[number]
        return codec.decode(block.slab[offset : offset + size], block.encoding, start.detector_shape, start.dtype)

    def _good(self) -> np.ndarray:
        path = self._resolution.known.get("pixel_mask")
        return good_pixels(self.start.detector_shape, self.start.pixel_mask, None if path is None else Path(path))

    def add(self, block: FrameBlock) -> None:
        """Take a block of this series' frames; what it points to is not needed afterwards."""
        block = self._pick(block)
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

    @property
    def closed_rows(self) -> int:
        """Rows that wait for ``accumulate``."""
        return 0 if self.engine is None else self.engine.closed_rows

    @property
    def renewed(self) -> int:
        """Grows when the image has become another one without new rows."""
        return 0 if self.engine is None else self.engine.renewed

    def accumulate(self) -> int:
        """Let closed rows into the image: see ``Engine.accumulate``."""
        return 0 if self.engine is None else self.engine.accumulate()

    def finish(self) -> None:
        """The series is over: everything that came is in the result now. Raises like :meth:`prepare`."""
        engine = self.prepare()
        engine.finish(self.start.frames)
        counters = engine.counters
        if engine.setup.scan.rows_by_time and counters.outside > counters.received // 2:
            self._note(
                "most frames came without a pause in the time stamps that could begin a row: is the detector running "
                "free, with a pause for the flyback? Else leave row_starts at index"
            )
        self._warn_of_bad_pixels(engine)

    def _warn_of_bad_pixels(self, engine: Engine) -> None:
        """Pixels that were not looked for, because the disk was given, may still be worth a word."""
        geometry = engine.setup.geometry
        if self._resolution.needs_disk or self._resolution.known.get("find_bad_pixels") is False:
            return
        if "pattern" not in engine.setup.channels:
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
        changed = Parameters(merged, sources, parameters.bad_pixels)
        engine.change(changed.probe, method_named(merged["method"]))
        self.parameters = changed

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
            engine.object() if "phase" in engine.setup.channels else None,
            engine.images(),
            engine.positions_received,
            self.parameters,
            engine.setup,
            engine.counters,
            self.source,
            max(1, engine.passes_done),
            {key: value for key, value in self.start.settings.items() if key not in Settings.model_fields},
        )


def _notes_on(start: SeriesStart, known: Mapping[str, Any]) -> list[str]:
    """What the user should know about how the detector sends its frames."""
    notes = []
    if len(start.channels) > 1 and "channel" not in known:
        notes.append(
            f"the stream has the channels {', '.join(start.channels)}; {start.channels[0]} is reconstructed, --channel "
            "takes another one, or the difference of two"
        )
    if start.flatfield is not None and start.settings.get("flatfield_applied") is False:
        notes.append("the detector has not applied its flat field, and neither do we: switch it on in the detector")
    if "orientation" not in known and _is_mirrored(start.settings):
        notes.append("this detector's firmware mirrors its images: --orientation arina-before-2024.1 puts them right")
    return notes


def _is_mirrored(settings: Mapping[str, Any]) -> bool:
    """Whether the stream says that it comes from an ARINA with firmware before release 2024.1."""
    if "arina" not in str(settings.get("detector", "")).lower():
        return False
    said = (str(settings.get(key, "")) for key in ("firmware", "software_version"))
    release = next(filter(None, (re.search(r"\b(20\d\d)\.(\d+)", text) for text in said)), None)
    return release is not None and (int(release[1]), int(release[2])) < (2024, 1)


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
