"""Hostile LZ4 blocks and chunks for the GPU kernels: ``python -m tests.gpu_fuzz LIBRARY SEED COUNT`` tries so many.

Every array is exactly as large as the kernels were told, so that an address sanitizer sees each byte beyond.
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import lz4.block
import numpy as np

from tests.gpu_host import Kernels

SOUND, DAMAGED, ELSEWHERE = 0, 2, 4


def unpack(block: bytes, wanted: int) -> bytes | None:
    """An LZ4 block by the letter of lz4_Block_format.md, or None where it breaks a rule or is not ``wanted`` bytes."""
    at, out = 0, bytearray()

    def length(value: int) -> int:
        nonlocal at
        while value >= 15:
            value += block[at]
            at += 1
            if block[at - 1] != 255:
                break
        return value

    try:
        while True:
            token = block[at]
            at += 1
            literals = length(token >> 4)
            if at + literals > len(block):
                return None
            out += block[at : at + literals]
            at += literals
            if at == len(block):
                return bytes(out) if len(out) == wanted else None
            if at > len(block) - 8 or len(out) > wanted - 12:  # the last 5 bytes are literals, no match in the last 12
                return None
            offset = int.from_bytes(block[at : at + 2], "little")
            if not 0 < offset <= len(out):
                return None
            at += 2
            match = length(token & 15) + 4
            # The bytes of a length end before the last literals, too.
            if at > len(block) - 5 or len(out) + match > wanted - 5:
                return None
            for _ in range(match):
                out.append(out[-offset])
    except IndexError:
        return None


def sound_block(rng: np.random.Generator, wanted: int) -> bytes:
    """An LZ4 block of ``wanted`` bytes: noise, runs, repeats at all distances, or empty planes."""
    kind = int(rng.integers(5))
    if kind == 0:
        data = rng.integers(0, 256, wanted, np.uint8)
    elif kind == 1:
        data = (rng.random(wanted) < 0.03).astype(np.uint8) << np.uint8(rng.integers(8))
    elif kind == 2:
        period = int(rng.integers(1, 40))
        data = np.resize(rng.integers(0, 256, period, np.uint8), wanted)
        data[rng.random(wanted) < 0.005] ^= 1
    elif kind == 3:
        data = np.repeat(rng.integers(0, 4, wanted, np.uint8), rng.integers(1, 300, wanted))[:wanted]
    else:
        data = np.zeros(wanted, np.uint8)
    return lz4.block.compress(data.tobytes(), store_size=False)


def damaged(rng: np.random.Generator, block: bytes) -> bytes:
    """The block with a few bytes changed, cut, lengthened, or something else altogether."""
    data = bytearray(block)
    for _ in range(int(rng.integers(1, 4))):
        kind = int(rng.integers(7))
        at = int(rng.integers(max(1, len(data))))
        if kind <= 1 and data:
            data[at] = int(rng.integers(256))
        elif kind == 2 and data:
            data[at] = int(rng.choice([0, 0x0F, 0xF0, 0xFF]))
        elif kind == 3:
            del data[at:]
        elif kind == 4:
            data[at:at] = bytes([255]) * int(rng.integers(1, 40))
        elif kind == 5:
            del data[at : at + int(rng.integers(1, 5))]
        else:
            data += rng.integers(0, 256, int(rng.integers(1, 20)), np.uint8).tobytes()
    return bytes(data)


def check_lz4(kernels: Kernels, blocks: list[tuple[bytes, int]]) -> int:
    """Compare the kernel with ``unpack`` for (block, wanted bytes), each a frame; returns how many were sound."""
    sound = 0
    for block, wanted in blocks:
        planes, status = np.full(wanted, 0xEE, np.uint8), np.zeros(1, np.int32)
        kernels(
            "unpack_blocks",
            (1,),
            32,
            (np.frombuffer(bytearray(block), np.uint8), np.zeros(1, np.int32), np.array([len(block)], np.int32),
             np.ones(1, np.uint8), np.int32(1), np.int64(wanted), np.int64(wanted), np.int32(wanted), np.int32(1),
             planes, status),
        )  # fmt: skip
        expected = unpack(block, wanted)
        assert (status[0] == SOUND) == (expected is not None), (block, wanted)
        if expected is not None:
            sound += 1
            assert planes.tobytes() == expected, (block, wanted)
    return sound


def check_framing(kernels: Kernels, payload: bytes, frame_bytes: int, packed: int, block_bytes: int) -> int:
    """Hand a payload to ``find_blocks`` and what it finds to ``unpack_blocks``: for sanitizers. Returns the status."""
    blocks = -(-packed // block_bytes)
    starts, lengths = np.zeros(blocks, np.int32), np.zeros(blocks, np.int32)
    planes, status, sums = np.zeros(frame_bytes, np.uint8), np.zeros(1, np.int32), np.ones(4, np.uint64)
    slab = np.frombuffer(bytearray(payload), np.uint8)
    framing = np.int64(frame_bytes), np.int64(packed), np.int32(block_bytes), np.int32(blocks)
    kernels(
        "find_blocks",
        (1,),
        32,
        (slab, np.zeros(1, np.int64), np.array([len(payload)]), np.int32(1), *framing, np.int32(8192), starts, lengths,
         planes, status, sums),
    )  # fmt: skip
    assert not sums.any()
    assert (lengths >= 0).all() == (status[0] == SOUND)
    wanted = np.ones(blocks, np.uint8)
    kernels("unpack_blocks", (blocks,), 32, (slab, starts, lengths, wanted, np.int32(1), *framing, planes, status))
    return int(status[0])


def main(library: str, seed: int, count: int) -> None:
    kernels, rng = Kernels(Path(library)), np.random.default_rng(seed)
    sound = 0
    for _ in range(count):
        wanted = int(rng.choice([8, 13, 64, 300, 1024, 8192]))
        block = sound_block(rng, wanted)
        hostile = [(damaged(rng, block), wanted) for _ in range(8)]
        noise = rng.integers(0, 256, int(rng.integers(1, 200)), np.uint8).tobytes()
        wrong = max(1, wanted + int(rng.integers(-20, 20)))
        sound += check_lz4(kernels, [(block, wanted), (block, wrong), (noise, wanted), *hostile])
    for _ in range(count):
        packed, tail, block_bytes = int(rng.choice([64, 1024, 3000 // 8 * 8])), int(rng.integers(8)), 1024
        body = b""
        for first in range(0, packed, block_bytes):
            block = sound_block(rng, min(block_bytes, packed - first))
            body += struct.pack(">I", len(block)) + block
        payload = struct.pack(">QI", packed + tail, block_bytes) + body + bytes(tail)
        assert check_framing(kernels, payload, packed + tail, packed, block_bytes) == SOUND
        for _ in range(8):
            check_framing(kernels, damaged(rng, payload), packed + tail, packed, block_bytes)
    print(f"{sound} sound blocks")  # noqa: T201 - the test reads it


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
