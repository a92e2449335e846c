"""What detectors and other people's simulators once sent goes through ``live`` to its end, over real sockets.

The bytes are those of the recordings in ``shared/data/streams``; the frames that must come out are decoded here by
other means (cbor2, lz4, numpy), pixel by pixel.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import h5py
import lz4.block
import msgpack
import numpy as np
import pytest
import zmq
import zmq.asyncio

from stream.api import Result, Session, Snapshot
from stream.config import Layer
from stream.recording import open_recording
from tests.data_helpers import SHARED_DATA
from tests.live_helpers import ANY_PORT, live_options, patiently

STREAMS = SHARED_DATA / "streams"

#: Optics that suit any frames: these are no pictures of anything.
OPTICS: dict[str, Any] = {"energy_kev": 200.0, "semiangle_mrad": 20.0, "scan_step_angstrom": 0.4, "bf_radius_px": 4.0}


def captured(name: str) -> list[list[bytes]]:
    path = STREAMS / name
    if not path.exists():
        pytest.skip(f"{path} is not there: the recorded streams come with the project's brief")
    return [message["parts"] for message in msgpack.unpackb(path.read_bytes(), raw=False)["messages"]]


def real_v1() -> list[list[bytes]]:
    """The recorded EIGER: one file for each part; a message begins with a header, an image or an end."""
    paths = sorted((STREAMS / "eiger_stream1_real").glob("streamData.*"))
    if not paths:
        pytest.skip("eiger_stream1_real is not there: the recorded streams come with the project's brief")
    messages: list[list[bytes]] = []
    for path in paths:
        part = path.read_bytes()
        if part.startswith((b'{"header_detail', b'{"frame"', b'{"htype":"dseries_end')):
            messages.append([])
        messages[-1].append(part)
    return messages


@asynccontextmanager
async def pushing(messages: Sequence[Sequence[bytes]]) -> Any:
    """A PUSH socket that sends these messages to whoever connects."""
    context = zmq.asyncio.Context()
    socket = context.socket(zmq.PUSH)
    socket.linger = 0
    socket.bind(ANY_PORT)

    async def send() -> None:
        for parts in messages:
            await socket.send_multipart(parts)

    sending = asyncio.create_task(send())
    try:
        yield socket.getsockopt_string(zmq.LAST_ENDPOINT)
        await patiently(sending)
    finally:
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        context.destroy(linger=0)


async def through_live(
    messages: Sequence[Sequence[bytes]], protocol: str, scan: tuple[int, int], centre: tuple[float, float], path: Path
) -> Result:
    flags = Layer.of("flag", {**OPTICS, "scan_shape": scan, "bf_centre_px": centre})
    async with pushing(messages) as endpoint:
        options = live_options(endpoint, protocol=protocol, layers=[flags], record=path)
        async with Session(options) as session:
            result = await patiently(session.wait())
    assert session.incomplete == ""
    assert result is not None
    return result


def assert_frames(result: Result, path: Path, frames: Sequence[np.ndarray]) -> None:
    """Everything arrived, and the mean pattern is that of the frames, masked pixels (the largest value) left out."""
    assert result.counters.received == len(frames)
    assert result.counters.missing == result.counters.undecodable == 0
    counts = np.array([np.where(frame == np.iinfo(frame.dtype).max, 0, frame) for frame in frames], np.float64)
    good = result.setup.geometry.good
    np.testing.assert_allclose(result.images["mean_pattern"][good], counts.mean(axis=0)[good], rtol=1e-6)
    with open_recording(path) as recording:
        assert recording.frames == len(frames)
        assert recording.complete


def v1_frames(messages: Sequence[Sequence[bytes]]) -> list[np.ndarray]:
    """By the book: the part before a blob says how it is packed."""
    parts = [part for message in messages for part in message]
    out = []
    for told, blob in zip(parts, parts[1:], strict=False):
        if not told.startswith(b"{") or b"dimage_d" not in told:
            continue
        header = json.loads(told)
        columns, rows = header["shape"][:2]
        dtype = np.dtype(header["type"]).newbyteorder("<")
        size = rows * columns * dtype.itemsize
        if header["encoding"] == "lz4<":
            raw = lz4.block.decompress(blob, uncompressed_size=size)
        elif header["encoding"] == "<":
            raw = blob
        else:
            raw = bslz4(blob, size, dtype.itemsize)
        out.append(np.frombuffer(raw, dtype).reshape(rows, columns))
    return out


def bslz4(blob: bytes, size: int, itemsize: int) -> bytes:
    """PROTOCOLS.md 1.4 in numpy; the first 12 bytes, which libertem-live's simulator leaves empty, are not needed."""
    at, done, out = 12, 0, []
    block = int.from_bytes(blob[8:12], "big") or 8192
    whole = size - size % (8 * itemsize)
    while done < whole:
        wanted = min(block, whole - done)
        length = int.from_bytes(blob[at : at + 4], "big")
        raw = lz4.block.decompress(blob[at + 4 : at + 4 + length], uncompressed_size=wanted)
        at, done = at + 4 + length, done + wanted
        bits = np.unpackbits(np.frombuffer(raw, np.uint8).reshape(8 * itemsize, -1), axis=1, bitorder="little")
        out.append(np.packbits(bits.T, axis=1, bitorder="little").tobytes())
    return b"".join([*out, blob[at:]])


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("source", "scan", "centre"),
    [
        pytest.param(lambda: captured("libertem_dectris_mock.msgpack"), (2, 3), (256.0, 256.0), id="libertem-live"),
        pytest.param(lambda: captured("tickit_legacy_basic.msgpack"), None, (2181.0, 2074.0), id="tickit"),
        pytest.param(lambda: real_v1()[:12], (2, 5), (300.0, 300.0), id="EIGER2 1M"),
    ],
)
async def test_recorded_stream_v1(source: Any, scan: Any, centre: tuple[float, float], tmp_path: Path) -> None:
    messages = source()
    frames = v1_frames(messages)
    assert frames
    result = await through_live(messages, "dectris-v1", scan or (1, len(frames)), centre, tmp_path / "scan.h5")
    assert_frames(result, tmp_path / "scan.h5", frames)
    result.save(tmp_path / "result.h5")
    with h5py.File(tmp_path / "result.h5") as file:  # which detector it was stays with the image
        assert json.loads(file.attrs["detector"])["detector"] == result.detector["detector"] != ""


@pytest.mark.timeout(180)
async def test_recorded_stream_v2(tmp_path: Path) -> None:
    import cbor2

    messages = captured("tickit_cbor_basic.msgpack")
    frames = []
    for part in (part for message in messages for part in message):
        told = cbor2.loads(part)
        if told["type"] == "image":
            (array,) = told["data"].values()
            (rows, columns), typed = array.value
            dtype = {64: "u1", 69: "<u2", 70: "<u4"}[typed.tag]
            blob = typed.value
            if isinstance(blob, cbor2.CBORTag):
                name, itemsize, blob = blob.value
                assert name == "bslz4"
                blob = bslz4(blob, int.from_bytes(blob[:8], "big"), itemsize)
            frames.append(np.frombuffer(blob, dtype).reshape(rows, columns))
    assert frames
    result = await through_live(messages, "dectris-v2", (1, len(frames)), (2181.0, 2074.0), tmp_path / "scan.h5")
    assert_frames(result, tmp_path / "scan.h5", frames)


async def test_recorded_merlin(tmp_path: Path) -> None:
    path = STREAMS / "merlin_sim_data.bin"
    if not path.exists():
        pytest.skip(f"{path} is not there: the recorded streams come with the project's brief")
    data = path.read_bytes()
    frames = []
    for piece in data.split(b"MPX,")[1:]:
        if b"MQ1," in piece[:20]:
            header = piece[11:]
            fields = header[:100].split(b",")
            columns, rows, offset = int(fields[4]), int(fields[5]), int(fields[2])
            dtype = {b"U08": "u1", b"U16": ">u2", b"U32": ">u4"}[fields[6]]
            pixels = np.frombuffer(header[offset:], dtype).reshape(rows, columns)
            frames.append(pixels.astype(pixels.dtype.newbyteorder("=")))

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for start in range(0, len(data), 10_000):  # in pieces that respect no message
            writer.write(data[start : start + 10_000])
            await writer.drain()
            await asyncio.sleep(0)
        await reader.read()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    endpoint = f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    flags = Layer.of("flag", {**OPTICS, "scan_shape": (2, len(frames) // 2), "bf_centre_px": (60.0, 120.0)})
    try:
        options = live_options(endpoint, protocol="merlin", layers=[flags], record=tmp_path / "scan.h5")
        async with Session(options) as session:
            result = await patiently(session.wait())
    finally:
        server.close()
    assert session.incomplete == ""
    assert result is not None
    assert result.counters.received == len(frames) == 8
    np.testing.assert_allclose(result.images["mean_pattern"], np.mean(frames, axis=0), rtol=1e-6)


# a detector whose messages go astray


async def lossy(messages: Sequence[Sequence[bytes]], path: Path) -> tuple[Session, list[Snapshot]]:
    flags = Layer.of("flag", {**OPTICS, "scan_shape": (2, 5), "bf_centre_px": (300.0, 300.0)})
    async with pushing(messages) as endpoint:
        options = live_options(endpoint, protocol="dectris-v1", layers=[flags], record=path)
        async with Session(options) as session:
            snapshots = [snapshot async for snapshot in session]
    return session, snapshots


async def test_lost_doubled_and_late_messages_of_a_real_stream(tmp_path: Path) -> None:
    header, *images, end = real_v1()[:12]
    order = [images[i] for i in (0, 1, 1, 3, 2, 9, 5, 6, 8)]  # 4 and 7 are lost, 1 is doubled, some are late
    session, _ = await lossy([images[7], header, *order, end], tmp_path / "scan.h5")
    assert session.result is not None
    counters = session.result.counters
    # The 7th frame came before its header: kept, and claimed.
    assert (counters.received, counters.duplicate, counters.missing) == (10, 1, 1)
    assert not session.result.positions_received[0, 4]


async def test_an_aborted_real_series_is_followed_by_the_next(tmp_path: Path) -> None:
    messages = real_v1()
    first, second = messages[:12], messages[12:]
    session, _ = await lossy([*first[:5], *second], tmp_path / "scan.h5")
    assert session.incomplete == ""
    assert session.result is not None
    assert session.result.counters.received == 10
    assert session.result.source.startswith(f"series {json.loads(second[0][0])['series']} ")
