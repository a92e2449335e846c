"""Offline reconstruction: a data file or a recording through the very same engine, block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from detectors.errors import ConfigurationError
from detectors.messages import Encoding, SeriesId, SeriesStart
from detectors.protocols.registry import StreamProtocol
from detectors.simulator.source import EncodedSource, FrameSource
from stream.array import choose_device
from stream.config import Layer
from stream.files import Dataset4D, open_dataset
from stream.parameters import Parameters
from stream.reconstruction import Reconstruction
from stream.recording import Recording, is_recording, open_recording
from stream.result import Result, describe_result, is_result

#: Called with (frames done, frames in all).
Progress = Callable[[int, int], None]

#: The name, among encodings, of a data file's own.
AS_STORED = "as-stored"


def file_start(dataset: Dataset4D) -> SeriesStart:
    """What a data file says of itself, as the start of a series."""
    return SeriesStart(
        "file",
        dataset.detector_shape,
        dataset.dtype,
        dataset.scan_shape,
        dataset.frames,
        dataset.settings,
        channels=dataset.channels,
        pixel_mask=dataset.pixel_mask,
        flatfield=dataset.flatfield,
        maximum_is_masked=dataset.maximum_is_masked,
    )


def _sent_start(dataset: Dataset4D, series: SeriesId) -> SeriesStart:
    """The same for a sender, which sends one channel."""
    return replace(file_start(dataset), series=series, channels=dataset.channels[:1])


class FileFrames:
    """A data file as a detector's frames: see ``detectors.simulator.source.FrameMaker``."""

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
        return _sent_start(self._dataset, series)

    def block(self, number: int) -> tuple[int, np.ndarray]:
        return self._dataset.read(self._parts[number])


class StoredFrames:
    """A data file's frames as they lie in it, never decoded: see ``detectors.simulator.source.FrameSource``.

    ``encoding``: what they are called in the stream; the dataset's own, or another word for the same bytes.
    """

    def __init__(self, dataset: Dataset4D, encoding: Encoding) -> None:
        self._dataset = dataset
        self.encoding = encoding

    @property
    def frames_per_pass(self) -> int:
        return self._dataset.frames

    def start(self, series: SeriesId) -> SeriesStart:
        return _sent_start(self._dataset, series)

    def blocks(self) -> Iterator[tuple[int, Sequence[memoryview]]]:
        for block in self._dataset.packed_blocks(max_bytes=4 << 20):
            payloads = [block.slab[o : o + n].data for o, n in zip(block.offsets, block.sizes, strict=True)]
            bounds = [0, *(np.flatnonzero(np.diff(block.indices) != 1) + 1).tolist(), len(block)]
            for start, stop in zip(bounds, bounds[1:], strict=False):
                yield int(block.indices[start]), payloads[start:stop]


def file_source(dataset: Dataset4D, protocol: StreamProtocol, encoding: str | None = None) -> FrameSource:
    """A data file's frames for a sender.

    ``encoding``: one of the protocol's, or ``as-stored``: the file's own bytes. None is as stored where the file has
    packed frames that the protocol can say, else the protocol's usual encoding. Raises ``ConfigurationError`` for an
    encoding that the protocol does not know, and for ``as-stored`` where it cannot be.
    """
    known = list(protocol.encodings.values())
    own = dataset.encoding
    if own is Encoding.RAW and own not in known and dataset.dtype.itemsize == 1:
        own = Encoding.RAW_BIG_ENDIAN  # the same, of bytes
    can = dataset.as_stored and own in known
    if encoding == AS_STORED and not can:
        kept = dataset.encoding.name.lower().replace("_", "-") if dataset.as_stored else "not one by one in chunks"
        raise ConfigurationError(
            f"{dataset.path.name} keeps its frames {kept}, which {protocol.name} cannot send as it is; choose "
            f"--encoding {', '.join(protocol.encodings)}"
        )
    if encoding == AS_STORED or (encoding is None and can):
        return StoredFrames(dataset, own)
    return EncodedSource(FileFrames(dataset), encoding_named(protocol, encoding))


def encoding_named(protocol: StreamProtocol, name: str | None) -> Encoding:
    """One of the protocol's encodings; its usual one for None. Raises ``ConfigurationError`` naming the known ones."""
    if name is None:
        return next(iter(protocol.encodings.values()))
    if name not in protocol.encodings:
        raise ConfigurationError(
            f"unknown encoding {name!r} for {protocol.name}; known are {', '.join(protocol.encodings)}"
        )
    return protocol.encodings[name]


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
        unread = 0
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
            start, blocks, total = file_start(data), data.packed_blocks(), data.frames
        run = Reconstruction(
            start,
            layers,
            choose_device(device),
            source=path.name,
            passes=passes,
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
            start, blocks, rows = recording.start, recording.blocks(), recording.describe()
        else:
            data = stack.enter_context(open_dataset(path, dataset))
            start, blocks, rows = file_start(data), data.packed_blocks(), data.describe()
        try:
            run = Reconstruction(
                start,
                layers,
                choose_device("cpu"),
                source=path.name,
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
