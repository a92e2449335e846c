"""What a batch brings, for the decoders that read frame by frame: frames that follow each other make one block."""

from __future__ import annotations

from itertools import accumulate

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

    def extend(self, series: SeriesId, encoding: Encoding, first: int, offset: int, sizes: list[int]) -> None:
        """Frames ``first``, ``first + 1``, ... of ``sizes`` bytes, end to end from ``offset`` in the slab."""
        if series != self._series or encoding is not self._encoding or self._own:
            self._begin(series, encoding)
        self._indices.extend(range(first, first + len(sizes)))
        self._offsets.extend(accumulate(sizes[:-1], initial=offset))
        self._sizes.extend(sizes)

    def say(self, message: Message) -> None:
        """Any other message, behind the frames before it."""
        self.close()
        self.messages.append(message)

    def close(self) -> None:
        """The block under way is complete."""
        if self._series is None:
            return
        indices, offsets, sizes, times = (
            np.array(values, np.int64) for values in (self._indices, self._offsets, self._sizes, self._times)
        )
        slab = self._batch.slab
        if self._own:
            slab, offsets = np.frombuffer(b"".join(self._own), np.uint8), np.cumsum(sizes) - sizes
        exposed_ns = times if len(times) == len(indices) else None
        self.messages.append(
            FrameBlock(self._series, self._encoding, indices, offsets, sizes, slab, self._batch.time_ns, exposed_ns)
        )
        self._series = None
