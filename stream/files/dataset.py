"""Frames of a 4D-STEM file in raster order, a bounded block at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np

from detectors.errors import DataFileError
from stream.files.hdf5 import HDF5_ERRORS, reason

#: Default size of a block; large enough that HDF5's cost per read vanishes, small enough for any machine.
BLOCK_BYTES = 32 * 2**20

_READ_AS_STORED = ("u1", "u2", "u4", "f4")

#: Shown by ``describe``: settings key -> (label, unit).
_LABELS = {
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
    """A run of frames in raster order: index of the first, where they lie in the dataset, shape of what is read."""

    first: int
    where: Any
    shape: tuple[int, ...]


class Dataset4D:
    """An open 4D-STEM data set. Use it as a context manager, or call :meth:`close`; made by ``open_dataset``.

    ``path``; ``layout``: name of the recognised layout; ``dataset``: path of the frames inside the file;
    ``scan_shape`` (rows, columns), or None for a 3-D dataset; ``detector_shape`` (rows, columns); ``dtype`` of the
    frames handed out (see :func:`frame_dtype`); ``frames``: how many; ``settings``: configuration keys that the file
    knows, in configuration units; ``pixel_mask``: bool (detector rows, columns), True = good, or None; ``notes``:
    sentences about what the file holds but was not used.
    """

    def __init__(
        self,
        path: Path,
        file: Any,
        dataset: Any,
        *,
        layout: str,
        settings: Mapping[str, Any] | None = None,
        pixel_mask: np.ndarray | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        """Take over the open ``file``. Raises ``DataFileError`` when ``dataset`` cannot be a series of frames."""
        self.path, self.layout, self.dataset = path, layout, str(dataset.name)
        self.settings: dict[str, Any] = dict(settings or {})
        self.pixel_mask, self.notes = pixel_mask, notes
        self._file, self._data = file, dataset
        shape = dataset.shape
        if shape is None or 0 in shape:
            raise DataFileError(f"{path}: dataset {self.dataset} is empty (shape {shape}); it holds no frames to read")
        dtype = frame_dtype(dataset.dtype)
        if dtype is None:
            raise DataFileError(
                f"{path}: dataset {self.dataset} holds {dataset.dtype} values; frames need real numbers, convert it"
            )
        self.dtype = dtype
        self.scan_shape: tuple[int, int] | None = (shape[0], shape[1]) if len(shape) == 4 else None
        self.detector_shape: tuple[int, int] = (shape[-2], shape[-1])
        self.frames: int = shape[0] * shape[1] if len(shape) == 4 else shape[0]
        self._require_filters()
        self._require_sources()

    def __enter__(self) -> Dataset4D:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. Harmless when it is closed already."""
        self._file.close()

    def blocks(self, max_bytes: int = BLOCK_BYTES) -> Iterator[tuple[int, np.ndarray]]:
        """All frames, in raster order: (index of the first frame, frames).

        Frames are a new C-contiguous array (n, detector rows, detector columns) of ``dtype``, of at most ``max_bytes``
        but at least one frame. Blocks follow the file's chunks, so that a compressed chunk is read once; only where a
        band of chunks across the scan is larger than ``max_bytes`` is it read again for each part of it. Values that
        are converted need the stored block beside it.
        Raises ``DataFileError`` naming the frames that cannot be read.
        """
        for part in self.parts(max_bytes):
            yield self.read(part)

    def parts(self, max_bytes: int = BLOCK_BYTES) -> Iterator[Part]:
        """How :meth:`blocks` cuts the frames up, for whoever reads some of them, or in another order."""
        rows, columns = self.detector_shape
        # Bounded by what is larger in memory, the stored or the converted frame.
        frame_bytes = rows * columns * max(self.dtype.itemsize, self._data.dtype.itemsize)
        most = max(1, max_bytes // frame_bytes)
        chunks = self._data.chunks or (1,) * self._data.ndim
        if self.scan_shape is None:
            for start, stop in _spans(self.frames, chunks[0], most):
                yield Part(start, np.s_[start:stop], (stop - start, rows, columns))
            return
        height, width = self.scan_shape
        if most >= width:
            for top, bottom in _spans(height, chunks[0], most // width):
                yield Part(top * width, np.s_[top:bottom], (bottom - top, width, rows, columns))
            return
        for row in range(height):
            for left, right in _spans(width, chunks[1], most):
                first = row * width + left
                yield Part(first, np.s_[row : row + 1, left:right], (1, right - left, rows, columns))

    def read(self, part: Part) -> tuple[int, np.ndarray]:
        """The frames of one part, as :meth:`blocks` gives them. Raises ``DataFileError``."""
        return part.first, self._read(part.first, part.where, part.shape)

    def describe(self) -> list[tuple[str, str]]:
        """What the file holds, as (label, text) rows for a table."""
        stored = self._data.dtype
        scan = f"{_by(self.scan_shape)} positions" if self.scan_shape else f"{self.frames} frames, scan shape not given"
        kind = stored.name if stored.newbyteorder("=") == self.dtype else f"{stored.name}, read as {self.dtype.name}"
        filters = ", ".join(self._filters().values()) or "not compressed"
        layout = f"chunks of {_by(self._data.chunks)}, {filters}" if self._data.chunks else "contiguous"
        size = self.frames * self.detector_shape[0] * self.detector_shape[1] * stored.itemsize
        rows = [
            ("file", str(self.path)),
            ("layout", self.layout),
            ("dataset", self.dataset),
            ("scan", scan),
            ("detector", f"{_by(self.detector_shape)} pixels"),
            ("pixel type", kind),
            ("size", f"{size / 1e6:.4g} MB, {layout}"),
        ]
        for key, (label, unit) in _LABELS.items():
            if key in self.settings:
                value = self.settings[key]
                rows.append((label, "none" if value == {} else f"{_text(value)} {unit}".rstrip()))
        if self.pixel_mask is not None:
            rows.append(("bad pixels", f"{int((~self.pixel_mask).sum())} of {self.pixel_mask.size}"))
        rows.extend(("note", note) for note in self.notes)
        return rows

    def _read(self, first: int, where: Any, shape: tuple[int, ...]) -> np.ndarray:
        block = np.empty(shape, dtype=self.dtype)
        try:
            if self._data.dtype == self.dtype:
                self._data.read_direct(block, where)
            else:
                # NumPy's conversion, not HDF5's: it is several times faster.
                with np.errstate(over="raise"):
                    block[...] = self._data[where]
        except FloatingPointError:
            raise DataFileError(
                f"{self.path}: {self._span(first, shape)} hold values beyond float32's range; rescale the data"
            ) from None
        except HDF5_ERRORS as error:
            raise DataFileError(
                f"{self.path}: {self._span(first, shape)} cannot be read ({reason(error)}); the file or the disk is "
                "damaged, copy the file again"
            ) from error
        return block.reshape(-1, *self.detector_shape)

    def _span(self, first: int, shape: tuple[int, ...]) -> str:
        count = int(np.prod(shape[:-2]))
        return f"frames {first} to {first + count - 1} of {self.dataset}"

    def _filters(self) -> dict[int, str]:
        plist = self._data.id.get_create_plist()
        entries = [plist.get_filter(i) for i in range(plist.get_nfilters())]
        return {code: bytes(name).decode(errors="replace").split(";")[0] for code, _, _, name in entries}

    def _require_filters(self) -> None:
        # Asked before the first read: HDF5 itself only says that some chunk could not be read.
        for code, name in self._filters().items():
            if not h5py.h5z.filter_avail(code):
                raise DataFileError(
                    f"{self.path}: dataset {self.dataset} is compressed with filter {code} ({name or 'no name'}), "
                    "which is not installed; install its HDF5 plugin or repack the file with gzip (h5repack)"
                )

    def _require_sources(self) -> None:
        # HDF5 reads zeros, without a word, where a file that a virtual dataset points to is missing.
        sources = {s.file_name for s in self._data.virtual_sources()} if self._data.is_virtual else set()
        for name in sorted(sources - {"."}):
            if "%" not in name and not (self.path.parent / name).exists() and not Path(name).exists():
                raise DataFileError(
                    f"{self.path}: dataset {self.dataset} takes frames from {name}, which is missing; put that file "
                    "beside this one"
                )


def _spans(length: int, chunk: int, most: int) -> Iterator[tuple[int, int]]:
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


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {number:g}" for key, number in value.items())
    if isinstance(value, list):
        return ", ".join(f"{number:.6g}" for number in value)
    return f"{value:.6g}"
