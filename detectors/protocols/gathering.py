"""What a batch brings, for the decoders that read frame by frame: frames that follow each other make one block."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from detectors.messages import Encoding, FrameBlock, Message, ReceivedBatch, SeriesId


class Gathering:
    """``messages``, in order of arrival; consecutive frames of one series and encoding become one ``FrameBlock``.

    :meth:`close` completes the last block, before ``messages`` is taken. A block has times if each of its frames has.
    """

    def __init__(self, batch: ReceivedBatch) -> None:
        self.messages: list[Message] = []
        self._batch = batch
        self._series: SeriesId | None = None
        """of the block under way; None: there is none"""
        self._begin(None, Encoding.RAW)

    def _begin(self, series: SeriesId | None, encoding: Encoding) -> None:
        self.close()
        self._series, self._encoding = series, encoding
        # Indices, offsets and sizes of what came as arrays, or was made arrays; the times of those that have them.
        self._pieces: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._piece_times: list[np.ndarray] = []
        # Lists of plain integers: a NumPy scalar costs ten times as much to take out or put in.
        self._indices: list[int] = []
        self._offsets: list[int] = []
        self._sizes: list[int] = []
        self._times: list[int] = []
        self._own: list[bytes] = []

    def add(
        self,
        series: SeriesId,
        encoding: Encoding,
        index: int,
        offset: int,
        size: int,
        time_ns: int | None = None,
        own: bytes | None = None,
    ) -> None:
        """A frame: ``size`` bytes at ``offset`` in the batch's slab, or ``own``, where they are not there."""
        if series != self._series or encoding is not self._encoding or (own is None) is bool(self._own):
            self._begin(series, encoding)
        self._indices.append(index)
        self._offsets.append(offset)
        self._sizes.append(size)
        if time_ns is not None:
            self._times.append(time_ns)
        if own is not None:
            self._own.append(own)

    def extend(
        self,
        series: SeriesId,
        encoding: Encoding,
        indices: np.ndarray,
        offsets: np.ndarray,
        sizes: np.ndarray,
        times_ns: np.ndarray | None = None,
    ) -> None:
        """Frames as arrays, int64 (frames,), which are kept: ``sizes`` bytes each at ``offsets`` in the slab."""
        if series != self._series or encoding is not self._encoding or self._own:
            self._begin(series, encoding)
        self._settle()
        self._pieces.append((indices, offsets, sizes))
        if times_ns is not None:
            self._piece_times.append(times_ns)

    def say(self, message: Message) -> None:
        """Any other message, behind the frames before it."""
        self.close()
        self.messages.append(message)

    def _settle(self) -> None:
        """What came frame by frame becomes arrays."""
        if not self._indices:
            return
        indices, offsets, sizes, times = (
            np.array(values, np.int64) for values in (self._indices, self._offsets, self._sizes, self._times)
        )
        self._pieces.append((indices, offsets, sizes))
        if len(times) == len(indices):
            self._piece_times.append(times)
        self._indices, self._offsets, self._sizes, self._times = [], [], [], []

    def close(self) -> None:
        """The block under way is complete."""
        if self._series is None:
            return
        self._settle()
        indices, offsets, sizes = (_joined([piece[i] for piece in self._pieces]) for i in range(3))
        slab = self._batch.slab
        if self._own:
            slab, offsets = np.frombuffer(b"".join(self._own), np.uint8), np.cumsum(sizes) - sizes
        exposed_ns = _joined(self._piece_times) if len(self._piece_times) == len(self._pieces) else None
        self.messages.append(
            FrameBlock(self._series, self._encoding, indices, offsets, sizes, slab, self._batch.time_ns, exposed_ns)
        )
        self._series = None


def _joined(pieces: Sequence[np.ndarray]) -> np.ndarray:
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
