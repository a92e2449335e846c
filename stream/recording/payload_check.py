"""Does a payload hold one whole frame? Answered without unpacking it, for a whole block in one compiled, GIL-free call.

Whoever keeps payloads as they came must know which of them a reader can unpack later. The sizes and every LZ4 sequence
are followed to their end by the letter of the format, but no pixel is written: 1-2 microseconds for a usual sparse
frame.
"""

from __future__ import annotations

import numpy as np

from detectors.messages import Encoding, FrameBlock
from stream.unpack import check_frames


def whole_frames(block: FrameBlock, detector_shape: tuple[int, int], dtype: np.dtype) -> np.ndarray:
    """bool (frames,): True where the payload unpacks to exactly one frame of ``detector_shape`` and ``dtype``."""
    pixels = detector_shape[0] * detector_shape[1]
    where = block.slab, block.offsets, block.sizes, int(block.encoding)
    return check_frames(*where, pixels, detector_shape[1], dtype.itemsize)


def prepare() -> None:
    """Load or compile the check, which can take a second: to be called before frames are waiting."""
    none, writable, read_only = np.empty(0, np.int64), np.empty(0, np.uint8), np.frombuffer(b"", np.uint8)
    for slab in (writable, read_only):
        whole_frames(FrameBlock(0, Encoding.RAW, none, none, none, slab), (1, 1), np.dtype("u1"))
