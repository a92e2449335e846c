"""A DECTRIS detector as ``stream.control`` sees it: SIMPLON in the words of a scan."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Self

import numpy as np

from detectors.errors import ConfigurationError, ConnectionFailed, LiveptychoError
from detectors.messages import SeriesId
from detectors.protocols import dectris
from detectors.simplon import Entry, Refused, Simplon
from stream.control.active_scan import DetectorFacts, Finished, Prepared, ScanPlan

logger = logging.getLogger(__name__)

#: A detector is given so long to enter a state [s]: after arming, and after the last frame.
_READY_S = 20.0
_IDLE_S = 1.0
_POLL_S = 0.05

_HOLDERS = "another client (GMS, NOVENA, Nion Swift, LiberTEM, ...)"

_FACTS = (
    *("x_pixels_in_detector", "y_pixels_in_detector", "bit_depth_image", "incident_energy", "photon_energy"),
    *("description", "detector_number", "eiger_fw_version", "software_version", "trigger_mode"),
    *("count_time", "frame_time", "threshold_energy", "flatfield_correction_applied"),
)
_THRESHOLDS = 4


class SimplonControl:
    """A DECTRIS detector over SIMPLON: see ``DetectorControl``. ``protocol``: that of its stream."""

    def __init__(self, url: str, protocol: str) -> None:
        if protocol not in dectris.FORMATS:
            raise ConfigurationError(
                f"a SIMPLON detector's stream is {' or '.join(dectris.FORMATS)}, not {protocol}: choose with --protocol"
            )
        self._dcu = Simplon(url)
        self._protocol, self._format = protocol, dectris.FORMATS[protocol]

    async def __aenter__(self) -> Self:
        await self._dcu.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._dcu.__aexit__(None, None, None)

    async def describe(self) -> DetectorFacts:
        config = await self._values("detector", "config", *_FACTS)
        stream = await self._values("stream", "config", "mode", "format", "header_detail")
        thresholds = await self._thresholds()
        if thresholds:
            config["threshold_energy"] = thresholds
        shape = tuple(config[key] for key in ("y_pixels_in_detector", "x_pixels_in_detector"))
        detector_shape = shape if all(type(n) is int and n > 0 for n in shape) else None
        bits = config["bit_depth_image"]
        return DetectorFacts(
            dectris.settings_of({**config, "flatfield_enabled": config["flatfield_correction_applied"]}),
            detector_shape,
            dectris.DTYPES.get(f"uint{bits}"),
            # With all details, the stream brings it along.
            None if stream["header_detail"] == "all" else await self._mask(detector_shape),
            tuple(self._warnings(await self._dcu.state(), stream)),
        )

    def _warnings(self, state: str | None, stream: Mapping[str, Any]) -> list[str]:
        out = []
        if state in ("na", "initialize", "error"):
            out.append(self._not_idle(state))
        if stream["mode"] == "disabled":
            out.append(
                "the detector's stream is switched off (stream/config/mode is disabled): enable it in the detector's "
                "software"
            )
        if stream["format"] in dectris.FORMATS.values() and stream["format"] != self._format:
            told = stream["format"]
            other = next(name for name, format_ in dectris.FORMATS.items() if format_ == told)
            out.append(f"the stream's format is {told}: use --protocol {other}, or switch the DCU to {self._format}")
        return out

    async def _values(self, module: str, kind: str, *keys: str) -> dict[str, Any]:
        """The values of ``keys``, None where the detector has none."""
        entries = await asyncio.gather(*(self._dcu.find(module, kind, key) for key in keys))
        return {key: None if entry is None else entry.value for key, entry in zip(keys, entries, strict=True)}

    async def _thresholds(self) -> dict[str, float]:
        """The energies of the thresholds that are in use [eV]."""
        numbers = range(1, _THRESHOLDS + 1)
        energies = await self._values("detector", "config", *(f"threshold/{n}/energy" for n in numbers))
        modes = await self._values("detector", "config", *(f"threshold/{n}/mode" for n in numbers))
        return {
            f"threshold_{n}": float(energy)
            for n, energy, mode in zip(numbers, energies.values(), modes.values(), strict=True)
            if isinstance(energy, int | float) and mode != "disabled"
        }

    async def _mask(self, shape: tuple[int, int] | None) -> np.ndarray | None:
        try:
            entry = await self._dcu.find("detector", "config", "pixel_mask")
        except LiveptychoError as error:
            logger.warning("the detector's pixel mask cannot be read: %s", error)
            return None
        mask = None if entry is None else entry.value
        if not isinstance(mask, np.ndarray) or mask.shape != shape or not np.issubdtype(mask.dtype, np.integer):
            return None  # with a region of interest, the mask is still that of the whole detector
        return dectris.good_pixels(mask)

    async def prepare(self, plan: ScanPlan) -> Prepared:
        """As ``DetectorControl``. Region of interest, binning, thresholds and energies are left as they are."""
        state = await self._dcu.state()
        if state not in (None, "idle"):
            raise ConfigurationError(self._not_idle(state))
        # The mask is asked for beside the stream: with all details, headers of large detectors take long.
        notes = [
            *await self._set("stream", "mode", "enabled"),
            *await self._set("stream", "format", self._format),
            *await self._set("stream", "header_detail", "basic", must=False),
        ]
        mode, images, triggers = {
            "software": ("ints", plan.frames, 1),
            "pixel": ("exts", 1, plan.frames),
            "line": ("exts", plan.frames_per_line, plan.frames // plan.frames_per_line),
            "gate": ("exte", 1, plan.frames),
        }[plan.trigger]
        wanted: list[tuple[str, Any, bool]] = [("trigger_mode", mode, True)]
        wanted += [("nimages", images, True), ("ntrigger", triggers, True), ("compression", "bslz4", False)]
        # The frame time follows the count time, and never falls below it and the readout: in this order.
        wanted += [
            (key, seconds, False)
            for key, seconds in (("count_time", plan.count_time_s), ("frame_time", plan.frame_time_s))
            if seconds is not None
        ]
        refused = set()
        for key, value, must in wanted:
            if problems := await self._set("detector", key, value, must=must):
                notes += problems
                refused.add(key)
        # One setting may change another: only what is there at the end counts.
        final = await self._values("detector", "config", *(key for key, _, _ in wanted), "frame_time")
        for key, value, must in wanted:
            if key not in refused and final[key] is not None and not _same(final[key], value):
                note = f"{key} was set to {value}, and the detector made it {final[key]}"
                if must:
                    raise ConfigurationError(f"{note}: it cannot be armed for this scan; choose another --trigger")
                notes.append(note)
        frame_time = final["frame_time"]
        return Prepared(float(frame_time) if isinstance(frame_time, int | float) else None, tuple(notes))

    async def _set(self, module: str, key: str, value: Any, *, must: bool = True) -> list[str]:
        """Set a key where it is something else; what could not be, in words. Raises where it ``must`` be."""
        entry = await self._dcu.find(module, "config", key)
        if entry is not None and _same(entry.value, value):
            return []
        if (module, key, value) == ("stream", "format", "legacy") and entry is None:
            return []  # before there was another one
        if problem := _unsettable(entry, value):
            problem = f"{module}/config/{key} cannot be set to {value}: {problem}"
        else:
            try:
                await self._dcu.put(module, key, value)
            except Refused as error:
                problem = str(error)
        if problem and must:
            other = "dectris-v1" if value == "cbor" else "dectris-v2"
            advice = f"use --protocol {other}" if key == "format" else "choose another --trigger"
            raise ConfigurationError(
                f"the detector cannot be set up for this scan: {problem}"
                + (f"; {advice}" if key in ("format", "trigger_mode") else "")
            )
        return [problem] if problem else []

    def _not_idle(self, state: str | None) -> str:
        command = f"{self._dcu.url}/detector/api/{self._dcu.version}/command/initialize"
        if state == "na":
            return (
                "the detector has not been initialised since it was switched on: do that in its software, or with "
                f"`curl -X PUT {command}`; it takes up to two minutes"
            )
        if state == "initialize":
            return "the detector is being initialised, which takes up to two minutes: try again then"
        if state == "error":
            return (
                f"the detector reports an error (its state is error): look at {self._dcu.url} in a browser; "
                f"`curl -X PUT {command}` initialises it anew"
            )
        return (
            f"{_HOLDERS} holds the detector: it is in state {state}; finish or disarm it there, or use liveptycho "
            "without --trigger"
        )

    async def arm(self) -> SeriesId:
        try:
            series = await self._dcu.arm()
            await self._await_ready()
        except LiveptychoError as error:
            # Whether it was armed is not known, or it was: it must not stay so.
            if not isinstance(error, Refused):
                with suppress(LiveptychoError):
                    await self.abort()
            raise
        return series

    async def _await_ready(self) -> None:
        # Where the state is not told, or has gone on already, there is nothing to wait for.
        state = await self._left(_READY_S, "configure", "initialize")
        if state in ("configure", "initialize"):
            raise ConnectionFailed(f"the detector was armed, but is still in state {state} after {_READY_S:.0f} s")
        if state == "error":
            raise ConfigurationError(self._not_idle(state))

    async def _left(self, seconds: float, *states: str) -> str | None:
        """Wait until the detector's state is none of ``states``, or for ``seconds``: the state then."""
        deadline = time.monotonic() + seconds
        while True:
            state = await self._dcu.state()
            if state not in states or time.monotonic() > deadline:
                return state
            await asyncio.sleep(_POLL_S)

    async def trigger(self) -> None:
        await self._dcu.command("trigger")

    async def flush(self) -> None:
        await self._dcu.command("disarm")

    async def abort(self) -> None:
        await self._dcu.command("abort")

    async def finish(self) -> Finished:
        # By itself, the detector becomes idle a moment after the last frame.
        state = await self._left(_IDLE_S, "configure", "ready", "acquire")
        if state not in ("idle", "na", "initialize"):
            await self._disarm()
        dropped = await self.dropped()
        return Finished(
            dropped,
            f"the detector dropped {dropped} images that nobody took: this computer or its network is too slow, or "
            "another client slowed the stream down"
            if dropped
            else "",
        )

    async def _disarm(self) -> None:
        """Disarm, cancel or abort: the first one that the detector takes."""
        for command in ("disarm", "cancel", "abort"):
            try:
                await self._dcu.command(command)
                return
            except Refused as error:
                logger.warning("%s", error)
                problem = error
        raise problem

    async def dropped(self) -> int | None:
        """As ``DetectorControl``; None also when the detector does not answer any more: the scan is over."""
        try:
            entry = await self._dcu.find("stream", "status", "dropped")
        except LiveptychoError as error:
            logger.warning("the detector's count of dropped images cannot be read: %s", error)
            return None
        return entry.value if entry is not None and type(entry.value) is int else None


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, float) or isinstance(other, float):
        return isinstance(one, int | float) and math.isclose(one, other, rel_tol=1e-3)
    return bool(type(one) is type(other) and one == other)


def _unsettable(entry: Entry | None, value: Any) -> str:
    if entry is None:
        return "there is no such key"
    if entry.access_mode == "r":
        return f"it is {entry.value}, and cannot be changed"
    if entry.allowed_values is not None and value not in entry.allowed_values:
        return f"allowed are {', '.join(map(str, entry.allowed_values))}"
    low = -math.inf if entry.minimum is None else entry.minimum
    high = math.inf if entry.maximum is None else entry.maximum
    if isinstance(value, int | float) and not low <= value <= high:
        return f"it lies between {low:g} and {high:g}{f' {entry.unit}' if entry.unit else ''}"
    return ""
