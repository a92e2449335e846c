"""Where a sender's frames come from: a simulated scan, a data file, a recording.

A ``FrameSource`` hands out packed frames, pass after pass. Whoever only has pictures (``FrameMaker``) gets them packed
by ``EncodedSource``, which works ahead in threads and remembers the result for the next pass.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np

from detectors.codec import encode
from detectors.messages import Encoding, SeriesId, SeriesStart

Payload = bytes | memoryview


class FrameSource(Protocol):
    """Packed frames in the order of their indices, and what is known about them."""

    @property
    def encoding(self) -> Encoding: ...

    @property
    def frames_per_pass(self) -> int:
        """How far the frame index moves from one pass to the next."""
        ...

    def start(self, series: SeriesId) -> SeriesStart:
        """The start of a series of *one* pass; the sender announces the number of frames for as many as it sends."""
        ...

    def blocks(self) -> Iterator[tuple[int, Sequence[Payload]]]:
        """One pass: (index of the first frame, payloads of consecutive frames). Consumed in a thread; may block."""
        ...


class FrameMaker(Protocol):
    """Pictures, in numbered blocks that may be made in any order and by several threads at once."""

    @property
    def frames_per_pass(self) -> int: ...

    @property
    def block_count(self) -> int: ...

    def start(self, series: SeriesId) -> SeriesStart: ...

    def block(self, number: int) -> tuple[int, np.ndarray]:
        """Block ``number`` of the pass: its first frame's index, and the frames (count, rows, columns)."""
        ...


class EncodedSource:
    """Packs the frames of a ``FrameMaker`` as ``encoding``: see ``FrameSource``.

    At most ``cache_bytes`` of packed frames are kept; blocks beyond that are made anew in every pass. ``threads`` is
    how many blocks are made at a time; twice as many are kept ready ahead of the sender.
    """

    def __init__(
        self,
        maker: FrameMaker,
        encoding: Encoding = Encoding.BSLZ4,
        *,
        cache_bytes: int = 1 << 30,
        threads: int | None = None,
    ) -> None:
        self.encoding = encoding
        self.threads = threads or min(4, os.cpu_count() or 1)
        self._maker = maker
        self._room = cache_bytes
        self._cache: dict[int, tuple[int, list[bytes]]] = {}
        self._lock = threading.Lock()

    @property
    def frames_per_pass(self) -> int:
        return self._maker.frames_per_pass

    @property
    def cached_frames(self) -> int:
        """How many frames need not be made again."""
        with self._lock:
            return sum(len(payloads) for _, payloads in self._cache.values())

    def start(self, series: SeriesId) -> SeriesStart:
        return self._maker.start(series)

    def prepare(self, progress: Callable[[int], None] | None = None) -> None:
        """Make every frame once, so that the first pass can be sent as fast as the later ones.

        Blocks its caller; ``progress`` is called with the number of frames made so far.
        """
        done = 0
        for _, payloads in self.blocks():
            done += len(payloads)
            if progress is not None:
                progress(done)

    def blocks(self) -> Iterator[tuple[int, Sequence[Payload]]]:
        if len(self._cache) == self._maker.block_count:
            yield from (self._cache[number] for number in range(self._maker.block_count))
            return
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="frame-maker")
        ahead: deque[Future[tuple[int, list[bytes]]]] = deque()
        try:
            for number in range(self._maker.block_count):
                ahead.append(pool.submit(self._packed, number))
                if len(ahead) > 2 * self.threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _packed(self, number: int) -> tuple[int, list[bytes]]:
        if number in self._cache:
            return self._cache[number]
        first, frames = self._maker.block(number)
        payloads = [encode(frame, self.encoding) for frame in frames]
        size = sum(map(len, payloads))
        with self._lock:
            if size <= self._room and number not in self._cache:
                self._room -= size
                self._cache[number] = (first, payloads)
        return first, payloads
