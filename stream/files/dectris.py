"""Files of DECTRIS' FileWriter. Source: dectris/documentation, filewriter/README.md, and recorded files.

"hdf5 nexus legacy nxmx"    <name>_master.h5: /entry/data/data_000001, ... are links to <name>_data_000001.h5, each a
                            dataset (images, rows, columns) with attributes image_nr_low and image_nr_high
"hdf5 nexus v2024.2 nxmx"   <name>_master.h5: /entry/data/data (images, channels, rows, columns) is virtual, assembled
                            from the data files; /entry/data/channel names the thresholds
a data file                 /entry/data/data with image_nr_low, without the detector's description

Each chunk is one frame, byte for byte what the detector streams as ``bslz4`` or ``lz4``.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from detectors.errors import DataFileError
from detectors.messages import Encoding, FrameBlock
from detectors.protocols.dectris import good_pixels, settings_of
from stream.files.chunks import packed_encoding, read_chunks
from stream.files.dataset import BLOCK_BYTES, Dataset4D, Part, by, most_frames, raw_block, spans
from stream.files.hdf5 import HDF5_ERRORS, frames_in, open_file, require_filters, require_sources
from stream.files.one_dataset import read_frames, storage
from stream.files.side_files import beside
from stream.files.units import decoded
from stream.files.virtual import sources

_DATA = "entry/data"
_DETECTOR = "entry/instrument/detector"
_DATA_FILE = "DECTRIS data file"
_NUMBERED = re.compile(r"data_(\d+)")

#: What the newer layout calls otherwise than the older one and the detector itself.
_RENAMED = {"flatfield_applied": "flatfield_correction_applied", "serial_number": "detector_number"}


@dataclass(frozen=True)
class _Lane:
    """Where the frames of one channel lie: from ``at`` on the first axis of dataset ``name`` in file ``path``; in a 4-D
    dataset at ``plane`` of the second."""

    path: Path
    name: str
    at: int = 0
    plane: int | None = None

    def place(self, number: int) -> tuple[int, ...]:
        return (self.at + number,) if self.plane is None else (self.at + number, self.plane)

    def span(self, start: int, stop: int) -> Any:
        where = slice(self.at + start, self.at + stop)
        return where if self.plane is None else (where, self.plane)


@dataclass(frozen=True)
class _Stretch:
    """Frames ``first`` to ``first + count - 1`` of the series, of every channel."""

    first: int
    count: int
    lanes: tuple[_Lane, ...]


def is_dectris(file: Any) -> bool:
    """Whether an open h5py file is DECTRIS': a master file or a data file."""
    group = file.get(_DATA)
    if not isinstance(group, h5py.Group):
        return False
    if f"{_DETECTOR}/detectorSpecific" in file or (_DETECTOR in file and any(map(_NUMBERED.fullmatch, group))):
        return True
    data = group.get("data")
    if not isinstance(data, h5py.Dataset):
        return False
    return (data.ndim == 4 and "channel" in group and _DETECTOR in file) or (
        data.ndim == 3 and "image_nr_low" in data.attrs
    )


class DectrisFrames(Dataset4D):
    """A master file with its data files, or one data file alone.

    ``channel``: the one to read, by name or by its number from 1; without it all are, the first of them decoded.
    """

    protocol = "dectris-v2"
    maximum_is_masked = True

    def __init__(self, path: Path, file: Any, channel: str | None = None) -> None:
        """Take what is needed from the open ``file``, which the caller closes. Raises ``DataFileError``."""
        self.path, self.dataset = path, f"/{_DATA}"
        self._reading = threading.Lock()  # files are opened anew for each block: there may be a thousand of them
        group = file[_DATA]
        notes: list[str] = []
        self._exposed_ns = None
        data = group.get("data")
        if isinstance(data, h5py.Dataset) and data.ndim == 4:
            self.layout = "DECTRIS master file (NXmx 2024.2)"
            self._stretches, self.channels = self._of_channels(data, group, channel)
            self._exposed_ns = _exposed_ns(group.get("start_time"), data.shape[0])
        elif isinstance(data, h5py.Dataset):
            self.layout = "DECTRIS master file" if _DETECTOR in file else _DATA_FILE
            self._stretches = [_Stretch(0, len(data), (_Lane(path, data.name),))]
        else:
            self.layout = "DECTRIS master file"
            self._stretches = self._of_links(group, notes)
        self._check(notes)
        config, mask, flatfield = _description(file, self.channels)
        self.settings = settings_of(config)
        self.pixel_mask = self._fitting(mask, "pixel mask", notes)
        self.flatfield = self._fitting(flatfield, "flat field", notes)
        if self.pixel_mask is not None and not self.pixel_mask.any():
            self.pixel_mask = None
            notes.append("the file's pixel mask calls every pixel bad and is not used")
        self._place(config, notes)
        self.notes = tuple(notes)

    def _of_links(self, group: Any, notes: list[str]) -> list[_Stretch]:
        """The data files of the older layout, in the order of their image numbers."""
        found = []
        names = sorted((name for name in group if _NUMBERED.fullmatch(name)), key=lambda name: int(name[5:]))
        for name in names:
            link = group.get(name, getlink=True)
            path, inside = self.path, f"{group.name}/{name}"
            if isinstance(link, h5py.ExternalLink):
                path, inside = self._beside(link.filename), link.path
            with open_file(path) as file:
                data = frames_in(path, file, inside)
                low, high = (data.attrs.get(f"image_nr_{end}") for end in ("low", "high"))
                numbered = low is not None and high is not None and int(high) - int(low) + 1 == len(data)
                found.append((int(low) if numbered else None, len(data), _Lane(path, inside)))
        if not found:
            raise DataFileError(
                f"{self.path}: a DECTRIS master file links its frames as /{_DATA}/data_000001 and so on, this one has "
                "none; was the series aborted before its first frame?"
            )
        numbers = [low for low, _, _ in found if low is not None]
        follow = len(numbers) == len(found) and all(
            low + count <= following for low, (_, count, _), following in zip(numbers, found, numbers[1:], strict=False)
        )
        if numbers and not follow:
            notes.append("the image numbers of the data files contradict each other; the files are read in their order")
        counts = [count for _, count, _ in found]
        firsts = [low - numbers[0] for low in numbers] if follow else [sum(counts[:i]) for i in range(len(counts))]
        return [_Stretch(first, count, (lane,)) for first, (_, count, lane) in zip(firsts, found, strict=True)]

    def _of_channels(self, data: Any, group: Any, channel: str | None) -> tuple[list[_Stretch], tuple[str, ...]]:
        """The stretches of the chosen channels, and their names."""
        names = [str(decoded(name)) for name in np.atleast_1d(group["channel"][()])] if "channel" in group else []
        if len(names) != data.shape[1]:
            names = [f"channel_{number + 1}" for number in range(data.shape[1])]
        planes = list(range(len(names)))
        if channel is not None:
            if channel not in names and not (channel.isdecimal() and 1 <= int(channel) <= len(names)):
                raise DataFileError(
                    f"{self.path}: the file has the channels {', '.join(names)}, not {channel!r}; choose one of them "
                    "with --dataset, by name or by number from 1"
                )
            planes = [names.index(channel) if channel in names else int(channel) - 1]
        require_sources(self.path, data)  # before they are looked for
        runs = sources(data, planes) if data.is_virtual else None
        if runs is None:
            lanes = tuple(_Lane(self.path, data.name, 0, plane) for plane in planes)
            stretches = [_Stretch(0, len(data), lanes)]
        else:
            stretches = [
                _Stretch(first, count, tuple(_Lane(self._beside(s.file), s.name, s.at, s.plane) for s in of_planes))
                for first, count, of_planes in runs
            ]
        return stretches, tuple(names[plane] for plane in planes)

    def _beside(self, name: str) -> Path:
        """Where HDF5 would find a file that this one names. Raises ``DataFileError`` when it is missing."""
        if name == ".":
            return self.path
        for path in (self.path.parent / name, Path(name)):
            if path.exists():
                return path
        raise DataFileError(
            f"{self.path}: the frames are in {name}, which is missing; put the data files beside the master file (one "
            "data file alone can be read as well)"
        )

    def _check(self, notes: list[str]) -> None:
        """Look at the first and the last frames' datasets, for what all have in common."""
        encodings, shapes = set(), set()
        for stretch in self._stretches:
            for lane in stretch.lanes:
                with open_file(lane.path) as file:
                    data = frames_in(lane.path, file, lane.name)
                    require_filters(lane.path, data)
                    require_sources(lane.path, data)
                    encodings.add(packed_encoding(data))
                    shapes.add((data.shape[-2:], data.dtype))
                    self._kept = storage(data)
        if len(shapes) > 1:
            listed = ", ".join(sorted(f"{by(shape)} {dtype}" for shape, dtype in shapes))
            raise DataFileError(f"{self.path}: the data files hold frames of different kinds ({listed})")
        frames = self._stretches[-1].first + self._stretches[-1].count
        (shape, dtype) = shapes.pop()
        self._set_frames((frames, *shape), dtype)
        packed = encodings.pop() if len(encodings) == 1 else None
        self.encoding, self.as_stored = packed or Encoding.RAW, packed is not None
        if missing := frames - sum(stretch.count for stretch in self._stretches):
            notes.append(f"{missing} of {frames} images are in none of the data files")

    def _fitting(self, array: np.ndarray | None, what: str, notes: list[str]) -> np.ndarray | None:
        if array is not None and array.shape != self.detector_shape:
            notes.append(f"the file's {what} of {by(array.shape)} pixels does not fit its frames and is not used")
            return None
        return array

    def _place(self, config: dict[str, Any], notes: list[str]) -> None:
        """Scan shape and optics, from the files beside this one or from the triggers."""
        found = beside(self.path)
        energy, tension = self.settings.get("energy_kev"), found.settings.get("energy_kev")
        if energy and tension and abs(energy - tension) > 0.01 * tension:
            notes.append(f"the detector was set to {energy:g} keV, the microscope to {tension:g} keV: this is used")
        self.settings |= found.settings
        self.scan_shape = found.scan_shape
        if self.scan_shape and self.layout == _DATA_FILE and self.scan_shape[0] * self.scan_shape[1] > self.frames:
            notes.append(f"the scan has {by(self.scan_shape)} positions, of which this data file alone holds a part")
            self.scan_shape = None
        images, triggers = config.get("nimages"), config.get("ntrigger")
        if type(images) is int and type(triggers) is int:
            if self.scan_shape is None and images > 1 and triggers > 1 and max(images, triggers) <= 65536:
                self.scan_shape = (triggers, images)
                notes.append(f"scan_shape {triggers}x{images} is that of {triggers} triggers for {images} images each")
            if images * triggers > self.frames:
                notes.append(f"the detector was set to take {images * triggers} images, the file has {self.frames}")
        notes.extend(found.notes)

    def parts(self, max_bytes: int = BLOCK_BYTES) -> Iterator[Part]:
        most = most_frames(self.detector_shape, max(self.dtype.itemsize, self._stored.itemsize), max_bytes)
        for stretch in self._stretches:
            for start, stop in spans(stretch.count, 1, most):
                yield Part(stretch.first + start, (stretch, start, stop), (stop - start, *self.detector_shape))

    def read(self, part: Part) -> tuple[int, np.ndarray]:
        return part.first, self._decoded(part, 0)

    def _decoded(self, part: Part, channel: int) -> np.ndarray:
        stretch, start, stop = part.where
        lane = stretch.lanes[channel]
        with self._reading, open_file(lane.path) as file:
            where = Part(part.first, lane.span(start, stop), part.shape)
            return read_frames(lane.path, frames_in(lane.path, file, lane.name), where, self.dtype)

    def packed_blocks(self, max_bytes: int = BLOCK_BYTES) -> Iterator[FrameBlock]:
        for part in self.parts(max_bytes):
            one, *others = [self._block(part, channel) for channel in range(max(1, len(self.channels)))]
            first, count = part.first, part.shape[0]
            exposed = None if self._exposed_ns is None else self._exposed_ns[first : first + count]
            yield FrameBlock(
                "file", one.encoding, one.indices, one.offsets, one.sizes, one.slab, 0, exposed, tuple(others)
            )

    def _block(self, part: Part, channel: int) -> FrameBlock:
        if not self.as_stored:
            return raw_block(part.first, self._decoded(part, channel))
        stretch, start, stop = part.where
        lane = stretch.lanes[channel]
        with self._reading, open_file(lane.path) as file:
            data = frames_in(lane.path, file, lane.name)
            places = [lane.place(number) for number in range(start, stop)]
            slab, offsets, sizes = read_chunks(data, places, self.encoding)
        indices = np.arange(part.first, part.first + len(places))
        return FrameBlock("file", self.encoding, indices, offsets, sizes, slab)

    def _storage(self) -> str:
        files = len({lane.path for stretch in self._stretches for lane in stretch.lanes})
        return f"{files} data file{'s' * (files > 1)}, {self._kept}"


def _exposed_ns(item: Any, frames: int) -> np.ndarray | None:
    """``start_time`` [s], one for each image, as int64 ns; None where there is nothing usable."""
    if not isinstance(item, h5py.Dataset) or item.shape != (frames,) or item.dtype.kind != "f":
        return None
    times = item[()].astype(np.float64)
    return (times * 1e9).round().astype(np.int64) if np.isfinite(times).all() and (abs(times) < 9e9).all() else None


def _description(file: Any, channels: Sequence[str]) -> tuple[dict[str, Any], np.ndarray | None, np.ndarray | None]:
    """What the master file says of the detector: its configuration, the good pixels, the flat field."""
    config: dict[str, Any] = {}
    detector = file.get(_DETECTOR)
    if not isinstance(detector, h5py.Group):
        return {}, None, None
    groups = [detector, detector.get("detectorSpecific"), file.get("entry/instrument/beam")]
    groups = [group for group in groups if isinstance(group, h5py.Group)]
    for group in groups:
        for name in group:
            item = group.get(name)
            if isinstance(item, h5py.Dataset) and item.size == 1 and item.dtype.names is None:
                value = decoded(np.asarray(item[()]).ravel()[0])
                value = value.item() if isinstance(value, np.generic) else value
                config.setdefault(_RENAMED.get(name, name), bool(value) if name.endswith("_applied") else value)
    own = [group for name in channels if isinstance(group := detector.get(f"{name}_channel"), h5py.Group)]
    if energies := {
        group.name.split("/")[-1].removesuffix("_channel"): np.asarray(group["threshold_energy"][()]).tolist()
        for group in own
        if "threshold_energy" in group
    }:
        config["threshold_energy"] = energies
    masks = [mask for group in own or groups if (mask := _image(group, "pixel_mask", "ui")) is not None]
    flatfields = [flat for group in own[:1] or groups if (flat := _image(group, "flatfield", "fui")) is not None]
    good = None
    for mask in masks:
        if good is None or mask.shape == good.shape:
            good = good_pixels(mask) if good is None else good & good_pixels(mask)
    return config, good, flatfields[0].astype(np.float32) if flatfields else None


def _image(group: Any, name: str, kinds: str) -> np.ndarray | None:
    item = group.get(name)
    if not isinstance(item, h5py.Dataset) or item.ndim != 2 or item.dtype.kind not in kinds:
        return None
    try:
        return np.asarray(item[()])
    except HDF5_ERRORS:
        return None
