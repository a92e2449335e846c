"""Merlin's frames read by plain NumPy, from the format's description alone: what the decoders are tested against."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tests.data_helpers import SHARED_DATA

STREAMS = SHARED_DATA / "streams"
ARCHIVES = STREAMS / "merlin_mib"

#: Pixels of the binary modes, as they lie in the file.
BINARY = {"U08": ">u1", "U16": ">u2", "U32": ">u4"}


@dataclass(frozen=True)
class MibFrame:
    """One frame of a ``.mib`` file: the fields of its header, and the bytes of header and pixels."""

    fields: list[str]
    header: bytes
    pixels: bytes

    @property
    def depth(self) -> int:
        return int(self.fields[self.fields.index("MQ1A") + 3])

    @property
    def image(self) -> np.ndarray:
        """The decoded picture (rows, columns)."""
        width, height, dtype, layout = int(self.fields[4]), int(self.fields[5]), self.fields[6], self.fields[7].strip()
        if dtype in BINARY:
            return np.frombuffer(self.pixels, BINARY[dtype]).reshape(height, width)
        return decode_raw(self.pixels, self.depth, width, height, quad=layout == "2x2")


def decode_raw(pixels: bytes, depth: int, width: int, height: int, *, quad: bool) -> np.ndarray:
    """A raw frame of 1, 6 or 12 bits, as uint8 or uint16; ``width`` and ``height`` as its header says."""
    words = np.frombuffer(pixels, ">u8").astype(np.uint64)
    bits, dtype = {1: (1, np.uint8), 6: (8, np.uint8), 12: (16, np.uint16)}[depth]
    shifts = np.arange(0, 64, bits, dtype=np.uint64)
    values = (words[:, None] >> shifts) & np.uint64((1 << bits) - 1)
    mosaic = values.astype(dtype).reshape(height, width)
    if not quad:
        return mosaic
    n = width // 4
    image = np.empty((2 * height, 2 * n), dtype)
    for row in range(height):
        q4, q3, q2, q1 = (mosaic[row, i * n : (i + 1) * n] for i in range(4))
        image[row, :n], image[row, n:] = q1, q2
        image[2 * height - 1 - row, :n], image[2 * height - 1 - row, n:] = q3[::-1], q4[::-1]
    return image


def encode_raw(image: np.ndarray, depth: int, *, quad: bool) -> bytes:
    """The inverse of ``decode_raw``, word by word."""
    bits = {1: 1, 6: 8, 12: 16}[depth]
    rows, columns = image.shape
    if quad:
        h, n = rows // 2, columns // 2
        lines = []
        for row in range(h):
            below = image[rows - 1 - row]
            lines.append(np.concatenate([below[n:][::-1], below[:n][::-1], image[row, n:], image[row, :n]]))
        image = np.array(lines)
    out = bytearray()
    values = [int(value) for value in image.reshape(-1)]
    for first in range(0, len(values), 64 // bits):
        word = sum(value << bits * i for i, value in enumerate(values[first : first + 64 // bits]))
        out += word.to_bytes(8, "big")
    return bytes(out)


def mib_frames(data: bytes) -> Iterator[MibFrame]:
    """The frames of a ``.mib`` file, header by header."""
    at = 0
    while at < len(data):
        offset = int(data[at + 11 : at + 16])
        header = data[at : at + offset]
        fields = header.rstrip(b"\0").decode("latin-1").split(",")
        pixels = int(fields[4]) * int(fields[5])
        if fields[6] == "R64":
            size = pixels * {1: 1, 6: 8, 12: 16}[int(fields[fields.index("MQ1A") + 3])] // 8
        else:
            size = pixels * np.dtype(BINARY[fields[6]]).itemsize
        yield MibFrame(fields, header, data[at + offset : at + offset + size])
        at += offset + size


def mib_names(suffix: str = ".mib") -> list[tuple[str, str]]:
    """(archive, member) of every recorded file of that kind; empty where the shared data are absent."""
    out: list[tuple[str, str]] = []
    for archive in sorted(ARCHIVES.glob("*.zip")):
        with zipfile.ZipFile(archive) as file:
            out += [(archive.name, name) for name in file.namelist() if name.endswith(suffix)]
    return out


def mib_bytes(archive: str, member: str) -> bytes:
    with zipfile.ZipFile(ARCHIVES / archive) as file:
        return file.read(member)
