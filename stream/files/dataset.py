"""What every file that holds frames is to the rest of the program: ``Dataset4D``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from detectors.errors import DataFileError
from detectors.messages import Encoding, FrameBlock

#: Default size of a block; large enough that the cost per read vanishes, small enough for any machine.
BLOCK_BYTES = 32 * 2**20

_READ_AS_STORED = ("u1", "u2", "u4", "f4")

#: Shown by ``describe``: settings key -> (label, unit).
_LABELS = {
    "detector": ("camera", ""),
    "energy_kev": ("energy", "keV"),
    "semiangle_mrad": ("semi-angle", "mrad"),
    "scan_step_angstrom": ("scan step", "Å (row, column)"),
    "detector_pixel_mrad": ("detector pixel", "mrad (row, column)"),
    "detector_pixel_inv_angstrom": ("detector pixel", "1/Å (row, column)"),
    "rotation_deg": ("rotation", "degrees"),
    "transpose": ("transpose", ""),
    "rolloff_mrad": ("aperture roll-off", "mrad"),
    "bf_centre_px": ("disk centre", "px (row, column)"),
    "bf_radius_px": ("disk radius", "px"),
    "aberrations": ("aberrations", "(Å, degrees)"),
    "frame_time_s": ("frame time", "s"),
    "trigger_mode": ("trigger mode", ""),
    "firmware": ("firmware", ""),
}


def frame_dtype(stored: np.dtype) -> np.dtype | None:
    """The dtype in which frames stored as ``stored`` are handed out; None when they cannot be frames.

    u1, u2, u4 and f4 stay what they are (in little-endian order) and booleans become u1. Everything else, i1 ... i8,
    u8, f2, f8, becomes f4: it is the one type that is safe before the last frame has been read, since a single negative
    value may come late. Integers beyond 2**24 are rounded to 24 bits there, far below their shot noise.
    """
    if stored.kind == "b":
        return np.dtype("u1")
    if stored.kind not in "uif":
        return None
    code = f"{stored.kind}{stored.itemsize}"
    return np.dtype(f"<{code}") if code in _READ_AS_STORED else np.dtype("<f4")


@dataclass(frozen=True)
class Part:
    """A run of frames in raster order: index of the first, where they lie in the file, shape of what is read."""

    first: int
    where: Any
    shape: tuple[int, ...]


class Dataset4D(ABC):
    """An open file of frames. Use it as a context manager, or call :meth:`close`; made by ``open_dataset``.

    ``path``; ``layout``: name of the recognised layout; ``dataset``: path of the frames inside the file, where it has
    such; ``scan_shape`` (rows, columns), or None where the file does not tell; ``detector_shape`` (rows, columns);
    ``dtype`` of the frames handed out (see :func:`frame_dtype`); ``frames``: how many; ``settings``: configuration keys
    that the file knows, in configuration units, and what is kept for the record; ``channels``: names of the thresholds
    that each frame comes with, empty where there is but one without a name; ``pixel_mask``: bool (detector rows,
    columns), True = good, or None; ``flatfield``: float32 likewise; ``maximum_is_masked``: the dtype's largest value
    stands for "no count"; ``notes``: sentences about what the file holds but was not used; ``encoding``: that of
    :meth:`packed_blocks`; ``as_stored``: whether those are the file's own bytes; ``protocol``: the stream
    protocol of the detector that writes such files.
    """

    path: Path
    layout: str
    dataset: str = ""
    scan_shape: tuple[int, int] | None = None
    detector_shape: tuple[int, int]
    dtype: np.dtype
    frames: int
    settings: dict[str, Any]
    channels: tuple[str, ...] = ()
    pixel_mask: np.ndarray | None = None
    flatfield: np.ndarray | None = None
    maximum_is_masked: bool = False
    notes: tuple[str, ...] = ()
    encoding: Encoding = Encoding.RAW
    as_stored: bool = False
    protocol: str = "native"
    _stored: np.dtype
    """dtype in the file"""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:  # noqa: B027 - not every file has something to close
        """Close the file. Harmless when it is closed already."""

    @abstractmethod
    def parts(self, max_bytes: int = BLOCK_BYTES) -> Iterator[Part]:
        """How :meth:`blocks` cuts the frames up, for whoever reads some of them, or in another order."""

    @abstractmethod
    def read(self, part: Part) -> tuple[int, np.ndarray]:
        """The frames of one part, as :meth:`blocks` gives them. Raises ``DataFileError``."""

    def blocks(self, max_bytes: int = BLOCK_BYTES) -> Iterator[tuple[int, np.ndarray]]:
        """All frames (of the first channel), decoded, in raster order: (index of the first frame, frames).

        Frames are a new C-contiguous array (n, detector rows, detector columns) of ``dtype``, of at most ``max_bytes``
        but at least one frame. Blocks follow the file's chunks, so that a compressed chunk is read once; only where a
        band of chunks across the scan is larger than ``max_bytes`` is it read again for each part of it. Values that
        are converted need the stored block beside it.
        Raises ``DataFileError`` naming the frames that cannot be read.
        """
        for part in self.parts(max_bytes):
            yield self.read(part)

    def packed_blocks(self, max_bytes: int = BLOCK_BYTES) -> Iterator[FrameBlock]:
        """All frames, in raster order, packed as ``encoding``: as they lie in the file where a stream knows such
        payloads, else decoded. ``max_bytes`` bounds a block's decoded frames, of each channel. The series is "file".
        """
        for first, frames in self.blocks(max_bytes):
            yield raw_block(first, frames)

    def describe(self) -> list[tuple[str, str]]:
        """What the file holds, as (label, text) rows for a table."""
        scan = f"{by(self.scan_shape)} positions" if self.scan_shape else f"{self.frames} frames, scan shape not given"
        kind = self._stored.name
        if self._stored.newbyteorder("=") != self.dtype:
            kind = f"{kind}, read as {self.dtype.name}"
        size = self.frames * self.detector_shape[0] * self.detector_shape[1] * self._stored.itemsize
        rows = [
            ("file", str(self.path)),
            ("layout", self.layout),
            *([("dataset", self.dataset)] if self.dataset else []),
            ("scan", scan),
            ("detector", f"{by(self.detector_shape)} pixels"),
            ("pixel type", kind),
            ("size", f"{size / 1e6:.4g} MB, {self._storage()}"),
        ]
        if self.channels:
            rows.append(("channels", ", ".join(self.channels)))
        for key, (label, unit) in _LABELS.items():
            if key in self.settings:
                value = self.settings[key]
                rows.append((label, "none" if value == {} else f"{_text(value)} {unit}".rstrip()))
        if self.pixel_mask is not None:
            rows.append(("bad pixels", f"{int((~self.pixel_mask).sum())} of {self.pixel_mask.size}"))
        rows.extend(("note", note) for note in self.notes)
        return rows

    def _storage(self) -> str:
        """How the frames are kept, in a few words."""
        return "not compressed"

    def _set_frames(self, shape: tuple[int, ...], stored: np.dtype) -> None:
        """Fill in what follows from an array (scan rows, columns, detector rows, columns), or (frames, rows, columns).

        Raises ``DataFileError`` when it cannot be a series of frames.
        """
        what = f"dataset {self.dataset}" if self.dataset else "the file"
        if not shape or 0 in shape:
            raise DataFileError(f"{self.path}: {what} is empty (shape {shape}); it holds no frames to read")
        if len(shape) not in (3, 4):
            raise DataFileError(
                f"{self.path}: {what} holds an array of {by(shape)} values; frames are expected as (scan rows, scan "
                "columns, detector rows, detector columns) or (frames, rows, columns)"
            )
        dtype = frame_dtype(stored)
        if dtype is None:
            raise DataFileError(f"{self.path}: {what} holds {stored} values; frames need real numbers, convert it")
        self.dtype, self._stored = dtype, stored
        self.scan_shape = (shape[0], shape[1]) if len(shape) == 4 else None
        self.detector_shape = (shape[-2], shape[-1])
        self.frames = shape[0] * shape[1] if len(shape) == 4 else shape[0]


class ArrayFrames(Dataset4D):
    """Frames in whatever can be sliced like an array: memory-mapped, or computed when asked for.

    ``array``: (scan rows, scan columns, detector rows, detector columns) or (frames, rows, columns).
    """

    def __init__(self, path: Path, array: Any, *, layout: str, settings: Mapping[str, Any], notes: tuple[str, ...]):
        self.path, self.layout, self.settings, self.notes = path, layout, dict(settings), notes
        self._set_frames(tuple(int(length) for length in array.shape), array.dtype)
        self._array = array

    def parts(self, max_bytes: int = BLOCK_BYTES) -> Iterator[Part]:
        most = most_frames(self.detector_shape, max(self.dtype.itemsize, self._stored.itemsize), max_bytes)
        if self.scan_shape is None:
            for start, stop in spans(self.frames, 1, most):
                yield Part(start, np.s_[start:stop], (stop - start, *self.detector_shape))
        else:
            yield from raster_parts(self.scan_shape, self.detector_shape, (1, 1), most)

    def read(self, part: Part) -> tuple[int, np.ndarray]:
        block = np.empty(part.shape, self.dtype)
        count = int(np.prod(part.shape[:-2]))
        try:
            with np.errstate(over="raise"):
                block[...] = self._take(part.where)
        except FloatingPointError:
            raise beyond_float32(self.path, part.first, count) from None
        except DataFileError:
            raise
        except Exception as error:  # whatever a foreign reader may raise
            raise DataFileError(
                f"{self.path}: frames {part.first} to {part.first + count - 1} cannot be read "
                f"({type(error).__name__}: {error}); the file is damaged or incomplete, copy it again"
            ) from error
        return part.first, block.reshape(-1, *self.detector_shape)

    def _take(self, where: Any) -> np.ndarray:
        return np.asarray(self._array[where])


def raw_block(first: int, frames: np.ndarray) -> FrameBlock:
    """Decoded frames (n, rows, columns), C-contiguous and little-endian, as a block, without another copy."""
    size = frames[0].nbytes
    indices = np.arange(first, first + len(frames))
    slab = frames.reshape(-1).view(np.uint8)
    return FrameBlock("file", Encoding.RAW, indices, np.arange(len(frames)) * size, np.full(len(frames), size), slab)


def most_frames(detector_shape: tuple[int, int], itemsize: int, max_bytes: int) -> int:
    """How many decoded frames fit, at least one."""
    return max(1, max_bytes // (detector_shape[0] * detector_shape[1] * itemsize))


def raster_parts(
    scan_shape: tuple[int, int], detector_shape: tuple[int, int], chunks: tuple[int, ...], most: int
) -> Iterator[Part]:
    """Parts of at most ``most`` frames of a 4-D array, whole rows where they fit, along its ``chunks``."""
    height, width = scan_shape
    if most >= width:
        for top, bottom in spans(height, chunks[0], most // width):
            yield Part(top * width, np.s_[top:bottom], (bottom - top, width, *detector_shape))
        return
    for row in range(height):
        for left, right in spans(width, chunks[1], most):
            yield Part(row * width + left, np.s_[row : row + 1, left:right], (1, right - left, *detector_shape))


def spans(length: int, chunk: int, most: int) -> Iterator[tuple[int, int]]:
    """Cut ``length`` into ranges of at most ``most`` that never share a chunk unless ``most`` is less than a chunk."""
    if most >= chunk:
        step = most - most % chunk
        for start in range(0, length, step):
            yield start, min(start + step, length)
        return
    for band in range(0, length, chunk):
        end = min(band + chunk, length)
        for start in range(band, end, most):
            yield start, min(start + most, end)


def beyond_float32(path: Path, first: int, count: int, dataset: str = "") -> DataFileError:
    """The error for values that no float32 can hold."""
    where = f" of {dataset}" if dataset else ""
    return DataFileError(
        f"{path}: frames {first} to {first + count - 1}{where} hold values beyond float32's range; rescale the data"
    )


def by(shape: tuple[int, ...]) -> str:
    """A shape in words: ``3 x 4``."""
    return " x ".join(map(str, shape))


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {number:g}" for key, number in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(f"{number:.6g}" for number in value)
    return f"{value:.6g}"
