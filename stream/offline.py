"""Offline reconstruction: a data file or a recording through the very same engine, block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from detectors.errors import ConfigurationError
from detectors.messages import Encoding, FrameBlock, SeriesId, SeriesStart
from stream.array import choose_device
from stream.config import Layer
from stream.files import Dataset4D, open_dataset
from stream.parameters import Parameters
from stream.reconstruction import Reconstruction
from stream.recording import Recording, is_recording, open_recording
from stream.result import Result, describe_result, is_result

#: Called with (frames done, frames in all).
Progress = Callable[[int, int], None]


def file_start(dataset: Dataset4D) -> SeriesStart:
    """What a data file says of itself, as the start of a series."""
    return SeriesStart(
        "file", dataset.detector_shape, dataset.dtype, dataset.scan_shape, dataset.frames, dataset.settings
    )


def file_blocks(dataset: Dataset4D) -> Iterator[FrameBlock]:
    """The frames of a data file as blocks of raw frames, without another copy."""
    for first, frames in dataset.blocks():
        size = frames[0].nbytes
        indices = np.arange(first, first + len(frames))
        offsets = np.arange(len(frames)) * size
        slab = frames.reshape(-1).view(np.uint8)
        yield FrameBlock("file", Encoding.RAW, indices, offsets, np.full(len(frames), size), slab)


class FileFrames:
    """A data file as a detector's frames: see ``detectors.source.FrameMaker``."""

    def __init__(self, dataset: Dataset4D) -> None:
        self._dataset = dataset
        self._parts = list(dataset.parts(max_bytes=4 << 20))

    @property
    def frames_per_pass(self) -> int:
        return self._dataset.frames

    @property
    def block_count(self) -> int:
        return len(self._parts)

    def start(self, series: SeriesId) -> SeriesStart:
        return replace(file_start(self._dataset), series=series)

    def block(self, number: int) -> tuple[int, np.ndarray]:
        return self._dataset.read(self._parts[number])


def reconstruct_file(
    path: str | Path,
    layers: Sequence[Layer] = (),
    *,
    dataset: str | None = None,
    device: str = "auto",
    passes: int | None = 0,
    progress: Progress | None = None,
    threads: int | None = None,
) -> Result:
    """Reconstruct a data file or a recording.

    ``layers``: settings in order of precedence, before what the file says; ``dataset``: path inside an HDF5 file;
    ``progress`` is called after every block. Memory is bounded by the engine's plan plus one block, whatever the size
    of the file. Raises ``DataFileError``, ``ConfigurationError`` or ``DoesNotFit``.
    """
    path = Path(path)
    with ExitStack() as stack:
        mask, unread = None, 0
        if is_recording(path):
            if dataset is not None:
                raise ConfigurationError(
                    f"{path} is a recording of a stream: it has no other datasets, leave --dataset out"
                )
            recording: Recording = stack.enter_context(open_recording(path))
            start, total = recording.start, recording.frames
            blocks = recording.blocks(keep_batches=False)
            unread = recording.undecodable_messages
        else:
            data = stack.enter_context(open_dataset(path, dataset))
            start, blocks, total, mask = file_start(data), file_blocks(data), data.frames, data.pixel_mask
        run = Reconstruction(
            start,
            layers,
            choose_device(device),
            source=path.name,
            passes=passes,
            file_mask=mask,
            threads=threads,
            start_source="file",
        )
        stack.callback(run.close)
        if unread:
            run.undecodable(unread, "messages that could not be read when the stream was recorded")
        # The next rows are contracted while the next block is read and decoded.
        with ThreadPoolExecutor(1, thread_name_prefix="accumulate") as worker:
            pending = worker.submit(run.accumulate)
            done = 0
            for block in blocks:
                run.add(block)
                done += len(block)
                if pending.done():
                    pending.result()
                    pending = worker.submit(_accumulate_all, run)
                if progress is not None:
                    progress(done, total)
            pending.result()
        run.finish()
        return run.result()


def _accumulate_all(run: Reconstruction) -> int:
    rows = 0
    while batch := run.accumulate():
        rows += batch
    return rows


@dataclass(frozen=True)
class Description:
    """What ``info`` shows: (label, text) ``rows``, ``notes`` for the user, and the settings with their sources.

    ``parameters`` is None where settings are missing; a note says which.
    """

    rows: Sequence[tuple[str, str]]
    notes: Sequence[str]
    parameters: Parameters | None = None


def describe_file(path: Path, layers: Sequence[Layer] = (), *, dataset: str | None = None) -> Description:
    """Describe a data file, a recording or a result; finds the bright-field disk in the first frames of the former two.

    Raises ``DataFileError`` for a file that is none of these.
    """
    if is_result(path):
        return Description(describe_result(path), ())
    with ExitStack() as stack:
        if is_recording(path):
            recording = stack.enter_context(open_recording(path))
            start, blocks, mask, rows = recording.start, recording.blocks(), None, recording.describe()
        else:
            data = stack.enter_context(open_dataset(path, dataset))
            start, blocks, mask, rows = file_start(data), file_blocks(data), data.pixel_mask, data.describe()
        try:
            run = Reconstruction(
                start,
                layers,
                choose_device("cpu"),
                source=path.name,
                file_mask=mask,
                start_source="file",
                survey_only=True,
            )
            for block in blocks:
                run.add(block)
                if run.surveyed:
                    break
            return Description(rows, run.notes, run.look())
        except ConfigurationError as error:
            return Description(rows, [str(error)])
