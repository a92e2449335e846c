"""Does a payload hold one whole frame? Answered without unpacking it, for a whole block in one compiled, GIL-free call.

Whoever keeps payloads as they came must know which of them a reader can unpack later. The sizes and every LZ4 sequence
are followed to their end, which is all that the LZ4 and bitshuffle libraries themselves check, but no pixel is written:
1-2 microseconds for a usual sparse frame.
"""

from __future__ import annotations

import numba
import numpy as np

from detectors.codec import BLOCK_BYTES
from detectors.messages import Encoding, FrameBlock

_compiled = numba.njit(nogil=True, cache=True, error_model="numpy")

_RAW, _LZ4 = int(Encoding.RAW), int(Encoding.LZ4)

# LZ4's rules for the end of a block (lz4_Block_format.md, "End of block conditions"): the last 5 bytes are literals,
# the last match starts at least 12 bytes before the end. The library refuses blocks that break them.
_LAST_LITERALS = 5
_MATCH_LIMIT = 12


def whole_frames(block: FrameBlock, frame_bytes: int, itemsize: int) -> np.ndarray:
    """bool (frames,): True where the payload unpacks to exactly ``frame_bytes`` bytes of ``itemsize``-byte pixels."""
    return _whole_frames(block.slab, block.offsets, block.sizes, int(block.encoding), frame_bytes, itemsize)


def prepare() -> None:
    """Load or compile the check, which can take a second: to be called before frames are waiting."""
    none, slab = np.empty(0, np.int64), np.empty(0, np.uint8)
    received, read_only = FrameBlock(0, Encoding.RAW, none, none, none, slab), np.frombuffer(b"", np.uint8)
    whole_frames(received, 1, 1)
    whole_frames(FrameBlock(0, Encoding.RAW, none, none, none, read_only), 1, 1)


@_compiled
def _big_endian(slab: np.ndarray, at: int, count: int) -> int:
    value = 0
    for i in range(count):
        value = value << 8 | int(slab[at + i])
    return value


@_compiled
def _lz4_fits(slab: np.ndarray, at: int, end: int, wanted: int) -> bool:
    """Whether the LZ4 block in ``slab[at:end]`` unpacks to exactly ``wanted`` bytes."""
    done = 0
    while at < end:
        token = int(slab[at])
        at += 1
        literals = token >> 4
        more = literals == 15
        while more:
            if at >= end:
                return False
            literals += int(slab[at])
            more = slab[at] == 255
            at += 1
        at += literals
        done += literals
        if at == end:
            return done == wanted
        if at > end - 3 - _LAST_LITERALS or done > wanted - _MATCH_LIMIT:
            return False
        if int(slab[at]) | int(slab[at + 1]) << 8 > done:
            return False
        at += 2
        match = token & 15
        more = match == 15
        while more:
            if at >= end - _LAST_LITERALS + 1:
                return False
            match += int(slab[at])
            more = slab[at] == 255
            at += 1
        done += match + 4
        if done > wanted - _LAST_LITERALS:
            return False
    return False


@_compiled
def _bslz4_fits(slab: np.ndarray, at: int, end: int, nbytes: int, itemsize: int) -> bool:
    if end - at < 12 or _big_endian(slab, at, 8) != nbytes:
        return False
    block = _big_endian(slab, at + 8, 4)
    if block == 0:
        block = BLOCK_BYTES
    group = 8 * itemsize
    if block % group:
        return False
    at += 12
    left = nbytes - nbytes % group
    while left > 0:
        if at + 4 > end:
            return False
        length = _big_endian(slab, at, 4)
        at += 4
        if length > end - at or not _lz4_fits(slab, at, at + length, min(block, left)):
            return False
        at += length
        left -= min(block, left)
    # What does not fill a group of 8 pixels follows as it is.
    return end - at == nbytes % group


@_compiled
def _whole_frames(
    slab: np.ndarray, offsets: np.ndarray, sizes: np.ndarray, encoding: int, nbytes: int, itemsize: int
) -> np.ndarray:
    whole = np.zeros(len(offsets), np.bool_)
    for i in range(len(offsets)):
        at, end = offsets[i], offsets[i] + sizes[i]
        if at < 0 or sizes[i] < 0 or end > len(slab):
            continue
        if encoding == _RAW:
            whole[i] = sizes[i] == nbytes
        elif encoding == _LZ4:
            whole[i] = _lz4_fits(slab, at, end, nbytes)
        else:
            whole[i] = _bslz4_fits(slab, at, end, nbytes, itemsize)
    return whole
