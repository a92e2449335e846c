"""Recordings: what was received comes back byte for byte, h5py reads the frames, and nothing is lost without a word."""

from __future__ import annotations

import multiprocessing
import os
import re
import resource
import shutil
import signal
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import lz4.block
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detectors.codec import MERLIN_BITS, decode, encode
from detectors.errors import DataFileError, ProtocolError
from detectors.messages import Encoding, FrameBlock, ReceivedBatch, SeriesEnd, SeriesStart
from detectors.protocols.native import Decoder as NativeDecoder
from detectors.protocols.native import Encoder as NativeEncoder
from stream.recording import Recorder, Recording, channels, direct, is_recording, open_recording
from stream.recording.payload_check import whole_frames

SHAPE = (12, 10)
DTYPES = ("<u1", "<u2", "<u4", "<f4")
ANY_PIXELS = [Encoding.RAW, Encoding.LZ4, Encoding.BSLZ4, Encoding.LZ4_BLOCKS, Encoding.RAW_BIG_ENDIAN]
Item = tuple[Encoding, int, bytes, int]  # encoding, frame index, payload, arrival time


def frames_of(dtype: str, count: int, shape: tuple[int, int] = SHAPE) -> np.ndarray:
    return np.random.default_rng(3).poisson(1.5, (count, *shape)).astype(dtype)


def start_of(dtype: str = "<u2", **changes: Any) -> SeriesStart:
    fields = {"series": 7, "detector_shape": SHAPE, "dtype": np.dtype(dtype), **changes}
    start = SeriesStart(**fields)
    return start if "header" in changes else SeriesStart(**{**fields, "header": tuple(NativeEncoder().start(start)[0])})


def block_of(
    payloads: Sequence[bytes], encoding: Encoding, *, first: int = 0, indices: Any = None, time_ns: int = 0,
    series: Any = 7,
) -> FrameBlock:  # fmt: skip
    """A block whose payloads lie somewhere inside a larger slab, as they do in a receiver's."""
    sizes = np.array([len(payload) for payload in payloads], np.int64)
    slab = np.frombuffer(bytearray(b"slab before" + b"".join(payloads) + b"after"), np.uint8)
    indices = np.arange(first, first + len(payloads)) if indices is None else np.asarray(indices, np.int64)
    return FrameBlock(series, encoding, indices, 11 + np.cumsum(sizes) - sizes, sizes, slab, time_ns)


def items_of(blocks: Iterator[FrameBlock] | Sequence[FrameBlock]) -> list[Item]:
    """Every frame of some blocks by itself."""
    return [
        (block.encoding, int(index), block.slab[offset : offset + size].tobytes(), block.time_ns)
        for block in blocks
        for index, offset, size in zip(block.indices, block.offsets, block.sizes, strict=True)
    ]


def record(path: Path, start: SeriesStart, blocks: Sequence[FrameBlock], end: SeriesEnd | None = None) -> Path:
    with Recorder(path, start, "native", "1.2.3") as recorder:
        for block in blocks:
            recorder.write(block)
        recorder.end(end)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "recording.h5"


@pytest.fixture
def child() -> Iterator[Callable[..., int]]:
    """Run a function in a process of its own and return its exit code."""
    started: list[Any] = []

    def run(function: Callable[..., None], *args: Any) -> int:
        process = multiprocessing.get_context("spawn").Process(target=function, args=args)
        started.append(process)
        process.start()
        process.join(60)
        assert process.exitcode is not None, "the child hangs"
        return int(process.exitcode)

    yield run
    for process in started:
        if process.is_alive():
            process.kill()
        process.join()
        process.close()


# what comes back


@pytest.mark.parametrize("encoding", ANY_PIXELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_frames_come_back_as_they_came(path: Path, dtype: str, encoding: Encoding) -> None:
    frames = frames_of(dtype, 20) // 3  # few counts, so that LZ4 finds something to pack
    payloads = [encode(frame, encoding) for frame in frames]
    blocks = [block_of(payloads[i : i + 7], encoding, first=i, time_ns=1000 + i) for i in range(0, 20, 7)]
    record(path, start_of(dtype), blocks)

    with open_recording(path) as recording:
        assert (recording.frames, recording.dtype, recording.detector_shape) == (20, np.dtype(dtype), SHAPE)
        again = list(recording.blocks())
    assert items_of(again) == items_of(blocks)
    assert [len(block) for block in again] == [7, 7, 6]  # as they arrived
    assert {block.series for block in again} == {7}
    with h5py.File(path) as file:  # nothing of liveptycho needed
        np.testing.assert_array_equal(file["frames"][...], frames)
        assert file["frame_index"][...].tolist() == list(range(20))
        assert file["arrival_time_ns"][...].tolist() == [1000] * 7 + [1007] * 7 + [1014] * 6


@pytest.mark.parametrize("write_chunks", [direct.write_plain, direct.write_compiled])
def test_both_ways_of_writing_chunks(
    path: Path, write_chunks: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    if write_chunks is direct.write_compiled and not direct.COMPILED:
        pytest.skip("h5py hides the functions of its HDF5 library")
    monkeypatch.setattr(channels, "write_chunks", write_chunks)
    payloads = [encode(frame, Encoding.BSLZ4) for frame in frames_of("<u2", 30)]
    payloads[4], payloads[29] = b"damaged", b""
    blocks = [block_of(payloads[i : i + 10], Encoding.BSLZ4, first=i) for i in range(0, 30, 10)]
    record(path, start_of(), blocks)
    with open_recording(path) as recording:
        assert items_of(recording.blocks()) == items_of(blocks)
    with h5py.File(path, "r+") as file:
        where = (file["frames"], 30, *(getattr(blocks[0], name) for name in ("slab", "offsets", "sizes")))
        with pytest.raises((OSError, ValueError, RuntimeError)):  # rows that the dataset does not have
            write_chunks(*where, np.ones(10, bool), 0)


@pytest.mark.parametrize("encoding", [Encoding.LZ4, Encoding.BSLZ4, Encoding.LZ4_BLOCKS])
def test_incompressible_and_constant_frames(path: Path, encoding: Encoding) -> None:
    noise = np.random.default_rng(0).integers(0, 65536, (100, 91)).astype("<u2")
    frames = np.stack([noise, np.zeros_like(noise), noise // 256, np.full_like(noise, 65535)])
    start = start_of(detector_shape=noise.shape)
    blocks = [block_of([encode(frame, encoding) for frame in frames], encoding)]
    record(path, start, blocks)
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["frames"][...], frames)
    with open_recording(path) as recording:
        assert items_of(recording.blocks()) == items_of(blocks)


def test_a_packed_lz4_block_as_large_as_the_frame_is_not_taken_for_pixels(path: Path) -> None:
    # LZ4 needs a few bytes for 200 literals and a match; the match must win exactly those back.
    rng, shape = np.random.default_rng(0), (20, 20)
    payload, frame = b"", np.empty(0, np.uint8)
    while len(payload) != 400:
        frame = rng.integers(0, 256, 400).astype("<u1")
        repeated = rng.integers(4, 20)
        frame[200 : 200 + repeated] = frame[100 : 100 + repeated]
        payload = lz4.block.compress(frame, store_size=False)
    assert payload != frame.tobytes()
    record(path, start_of("<u1", detector_shape=shape), [block_of([payload], Encoding.LZ4)])
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["frames"][0], frame.reshape(shape))
    with open_recording(path) as recording:
        ((encoding, _, again, _),) = items_of(recording.blocks())
        assert decode(again, encoding, shape, recording.dtype).tobytes() == frame.tobytes()


def test_mixed_encodings_keep_theirs(path: Path) -> None:
    frames = frames_of("<u2", 30)
    blocks = [
        block_of([encode(frame, encoding) for frame in frames[i * 5 : i * 5 + 5]], encoding, first=i * 5)
        for i, encoding in enumerate([*ANY_PIXELS, Encoding.RAW])
    ]
    record(path, start_of(), blocks)
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["frames"][...], frames)
    with open_recording(path) as recording:
        assert items_of(recording.blocks(keep_batches=False)) == items_of(blocks)


@pytest.mark.parametrize("encoding", MERLIN_BITS)
def test_merlins_raw_frames_are_readable_and_come_back(path: Path, encoding: Encoding) -> None:
    """HDF5 does not know their order of pixels; payloads come back whatever their bits."""
    dtype, shape = np.dtype("<u2" if MERLIN_BITS[encoding] == 12 else "<u1"), (4, 256)
    size = 128 if MERLIN_BITS[encoding] == 1 else 1024 * dtype.itemsize
    payloads = [np.random.default_rng(i).bytes(size) for i in range(5)]
    blocks = [block_of([*payloads, payloads[0][:-8]], encoding)]
    record(path, start_of(dtype.str, detector_shape=shape), blocks)
    with h5py.File(path) as file:
        stored = file["frames"][...]
        assert file["encoding"][...].tolist() == [encoding] * 6
        assert file["damaged/at"][...].tolist() == [5]
    np.testing.assert_array_equal(stored[:5], [decode(payload, encoding, shape, dtype) for payload in payloads])
    assert not stored[5].any()
    with open_recording(path) as recording:
        assert items_of(recording.blocks()) == items_of(blocks)


@pytest.mark.parametrize("block_bytes", [0, 1 << 31])
def test_chunks_with_strange_block_sizes(path: Path, block_bytes: int) -> None:
    """What is taken must be readable with h5py, too."""
    frame = frames_of("<u2", 1)[0]
    payload = encode(frame, Encoding.BSLZ4)
    payload = payload[:8] + struct.pack(">I", block_bytes) + payload[12:]
    record(path, start_of(), [block_of([payload], Encoding.BSLZ4)])
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["frames"][0], frame)


# several channels, and when frames were exposed


def channels_of(first: int, count: int, *, exposed: bool = True) -> FrameBlock:
    """Three channels, each packed in its own way; the second one's first payload is damaged."""
    blocks = []
    for number, encoding in enumerate((Encoding.BSLZ4, Encoding.LZ4_BLOCKS, Encoding.RAW)):
        payloads = [encode(frame + 100 * number, encoding) for frame in frames_of("<u2", count)]
        if number == 1:
            payloads[0] = payloads[0][:-1]
        block = block_of(payloads, encoding, first=first, time_ns=first)
        blocks.append(replace(block, exposed_ns=10**18 + 1000 * block.indices if exposed else None))
    return replace(blocks[0], others=tuple(blocks[1:]))


CHANNELS = ("threshold_1", "größer", "difference")


def test_every_channel_is_kept(path: Path) -> None:
    blocks = [channels_of(0, 4), channels_of(4, 3)]
    start = start_of(channels=CHANNELS, header=(b"start",))
    with Recorder(path, start, "native", "1") as recorder:
        for block in blocks:
            recorder.write(block)
        assert (recorder.frames, recorder.damaged) == (7, 2)
        assert recorder.bytes == sum(block.payload_bytes for block in blocks)
    expected = np.concatenate([frames_of("<u2", 4), frames_of("<u2", 3)])
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["frames"][...], expected)
        np.testing.assert_array_equal(file["channels/2/frames"][...], expected + 200)
        np.testing.assert_array_equal(file["channels/1/frames"][...][[1, 2, 3, 5, 6]], expected[[1, 2, 3, 5, 6]] + 100)
        assert not file["channels/1/frames"][...][[0, 4]].any()
    with open_recording(path) as recording:
        assert recording.start == start
        assert recording.damaged_frames == 2
        assert ("channels", "threshold_1, größer, difference") in recording.describe()
        for keep, count in ((True, 2), (False, 1)):
            again = list(recording.blocks(keep_batches=keep))
            assert len(again) == count
            for number in range(3):
                items = [(*item[:3], 0) for item in items_of([block.channel(number) for block in again])]
                assert items == [(*item[:3], 0) for item in items_of([block.channel(number) for block in blocks])]
        few = list(recording.blocks(max_bytes=blocks[0].payload_bytes // 4))
        assert len(few) == 7  # the bytes of all channels count


def test_channels_that_were_not_announced(path: Path) -> None:
    with Recorder(path, start_of(channels=CHANNELS[:2]), "native", "1") as recorder:
        block = channels_of(0, 4)
        with pytest.raises(ValueError, match="frames of 3 channels in a recording of 2"):
            recorder.write(block)
        with pytest.raises(ValueError, match="frames of 1 channels in a recording of 2"):
            recorder.write(block.channel(0))
        recorder.write(replace(block, others=block.others[:1]))
    with open_recording(path) as recording:
        assert recording.frames == 4


def test_times_of_exposure_where_the_stream_says(path: Path) -> None:
    payload = bytes(240)
    told = [None, None, 5, 6, None, 0, -7, None]
    blocks = []
    for i, time in enumerate(told):
        block = block_of([payload] * 2, Encoding.RAW, first=2 * i)
        blocks.append(block if time is None else replace(block, exposed_ns=np.array([time, time + 1])))
    with Recorder(path, start_of(), "native", "1") as recorder:
        for i, block in enumerate(blocks):
            recorder.write(block)
            if i in (0, 3):
                recorder.flush()
    with open_recording(path) as recording:
        again = list(recording.blocks())
    times = [None if block.exposed_ns is None else block.exposed_ns.tolist() for block in again]
    assert times == [None, [5, 6, 6, 7], None, [0, 1, -7, -6], None]
    assert [len(block) for block in again] == [4, 4, 2, 4, 2]
    assert items_of(again) == items_of(blocks)
    with h5py.File(path) as file:
        assert len(file["exposed_ns"]) == 14


def test_what_the_stream_says_of_its_pixels(path: Path) -> None:
    mask, flatfield = np.random.default_rng(0).random(SHAPE) > 0.1, np.linspace(0, 2, 120, dtype="f4").reshape(SHAPE)
    start = start_of(pixel_mask=mask, flatfield=flatfield, maximum_is_masked=True, header=())
    record(path, start, [])
    with open_recording(path) as recording:
        assert recording.start == start
        for got, sent in ((recording.start.pixel_mask, mask), (recording.start.flatfield, flatfield)):
            assert got is not None
            np.testing.assert_array_equal(got, sent)
            assert got.dtype == sent.dtype
    record(path.with_name("without.h5"), start_of(), [])
    with open_recording(path.with_name("without.h5")) as recording:
        assert recording.start.pixel_mask is recording.start.flatfield is None
        assert not recording.start.maximum_is_masked
        assert recording.start.channels == ()


def test_duplicates_and_disorder_are_recorded(path: Path) -> None:
    frames = frames_of("<u2", 5)
    order = [4, 0, 0, 1, 2**53, 3]
    payloads = [encode(frames[i % 5], Encoding.BSLZ4) for i in order]
    record(path, start_of(), [block_of(payloads, Encoding.BSLZ4, indices=order)])
    with open_recording(path) as recording:
        assert [(index, payload) for _, index, payload, _ in items_of(recording.blocks())] == list(
            zip(order, payloads, strict=True)
        )


def test_damaged_payloads_are_kept_and_the_others_stay_readable(path: Path) -> None:
    frames = frames_of("<u2", 12)
    good = {
        encoding: [encode(frame, encoding) for frame in frames]
        for encoding in (Encoding.RAW, Encoding.LZ4, Encoding.BSLZ4)
    }
    flipped = bytearray(good[Encoding.BSLZ4][1])
    flipped[16:18] = b"\xf0\xff"  # many more literals than there are
    blocks = [
        block_of([good[Encoding.BSLZ4][0], bytes(flipped), good[Encoding.BSLZ4][2][:-3], b""], Encoding.BSLZ4),
        block_of([good[Encoding.RAW][4][:-1], good[Encoding.RAW][5] * 2, good[Encoding.RAW][6]], Encoding.RAW, first=4),
        block_of([good[Encoding.LZ4][7][:-2], good[Encoding.LZ4][8], b"\xff" * 300], Encoding.LZ4, first=7),
        block_of([b"\0" * 5, b"\0" * 500, good[Encoding.LZ4][11]], Encoding.BSLZ4, first=10),
    ]
    with Recorder(path, start_of(), "native", "1") as recorder:
        for block in blocks[:2]:
            recorder.write(block)
        recorder.flush()
        for block in blocks[2:]:
            recorder.write(block)
        assert (recorder.frames, recorder.damaged) == (13, 10)
        assert recorder.bytes == sum(int(block.sizes.sum()) for block in blocks)
    with h5py.File(path) as file:
        assert file["damaged/at"][...].tolist() == [1, 2, 3, 4, 5, 7, 9, 10, 11, 12]
        stored = file["frames"][...]  # raises nothing
    expected = np.zeros((13, *SHAPE), "<u2")
    expected[[0, 6, 8]] = frames[[0, 6, 8]]
    np.testing.assert_array_equal(stored, expected)
    with open_recording(path) as recording:
        assert items_of(recording.blocks()) == items_of(blocks)
        assert recording.damaged_frames == 10
        assert any("10 damaged frames" in text for _, text in recording.describe())


def test_the_stream_recorded_is_the_stream_replayed(path: Path) -> None:
    """From the wire into the file and out again through the protocol's own encoder and decoder."""
    encoder, decoder = NativeEncoder(), NativeDecoder()
    payloads = [encode(frame, Encoding.BSLZ4) for frame in frames_of("<u2", 40)]
    start = start_of(settings={"energy_kev": 200.0}, scan_shape=(5, 8), frames=40)
    wire = encoder.start(start)
    for i in range(0, 40, 4):
        wire += encoder.frames(7, i, payloads[i : i + 4], Encoding.BSLZ4)
    wire += encoder.end(7)
    begun, blocks, ended = decoder.feed(ReceivedBatch.from_messages(wire, time_ns=5))
    assert isinstance(begun, SeriesStart)
    assert isinstance(blocks, FrameBlock)
    assert isinstance(ended, SeriesEnd)
    record(path, begun, [blocks], ended)
    with open_recording(path) as recording:
        assert recording.start == begun
        assert recording.end == ended
        assert items_of(recording.blocks()) == items_of([blocks])


@pytest.mark.parametrize(("max_bytes", "max_frames", "keep", "expected"), [
    (1 << 20, 512, True, [3, 6, 1]),
    (1 << 20, 512, False, [10]),
    (1 << 20, 4, True, [3, 4, 2, 1]),
    (1 << 20, 4, False, [4, 4, 2]),
    (500, 512, False, [2, 2, 2, 2, 2]),
    (1, 512, False, [1] * 10),
])  # fmt: skip
def test_sizes_of_blocks(path: Path, max_bytes: int, max_frames: int, keep: bool, expected: list[int]) -> None:
    payloads = [frame.tobytes() for frame in frames_of("<u2", 10)]  # 240 bytes each
    blocks = [block_of(payloads[a:b], Encoding.RAW, first=a, time_ns=a) for a, b in ((0, 3), (3, 9), (9, 10))]
    record(path, start_of(), blocks)
    with open_recording(path) as recording:
        again = list(recording.blocks(max_bytes, max_frames, keep_batches=keep))
    assert [len(block) for block in again] == expected
    assert [item[:3] for item in items_of(again)] == [item[:3] for item in items_of(blocks)]


# what is known about the series


def test_everything_about_the_series_is_kept(path: Path) -> None:
    told = {"energy_kev": 80, "scan_step_angstrom": [0.5, 0.5], "transpose": True, "aberrations": {"C10": -30.0},
            "text": "é\0\ud800", "none": None, "huge": 2**70}  # fmt: skip
    start = start_of(series="süß\0", scan_shape=(3, 4), frames=2**53, settings=told, header=(b"one", b"", b"\0three"))
    end = SeriesEnd("süß\0", (b"over", b"\0"))
    with Recorder(path, start, "native", "1.2.3") as recorder:
        recorder.write(block_of([b"\0" * 240], Encoding.RAW, series="süß\0", time_ns=10**18))
        recorder.undecodable()
        recorder.undecodable(3)
        recorder.end(end)
        recorder.write(block_of([b"\1" * 240], Encoding.RAW, first=1, series="süß\0", time_ns=10**18 + 1_500_000_000))
    with open_recording(path) as recording:
        assert recording.start == start
        assert recording.settings == told
        assert (recording.scan_shape, recording.frames) == ((3, 4), 2)  # the late frame too
        assert (recording.protocol, recording.program_version) == ("native", "1.2.3")
        assert (recording.messages_start, recording.messages_end) == (start.header, end.header)
        assert (recording.end, recording.complete, recording.undecodable_messages) == (end, True, 4)
        assert recording.duration_s == 1.5
        described = dict(recording.describe())
    assert described["frames"] == f"2 of {2**53} announced"
    assert described["scan"] == "3 x 4 positions"
    assert described["energy_kev"] == "80"
    assert described["duration"] == "1.5 s"
    with h5py.File(path) as file:
        assert file.attrs["format"] == "liveptycho-recording"
        assert file.attrs["complete"]
        assert file.attrs["frames_announced"] == 2**53


def test_settings_that_json_does_not_know(path: Path) -> None:
    told = {"mask": np.eye(2, dtype=np.int64), "step": np.float64(0.5), "blob": b"x", "map": {b"key": 1, "kept": 2}}
    with Recorder(path, start_of(settings=told, header=()), "native", "1"):
        pass
    with open_recording(path) as recording:
        assert recording.settings == {"mask": [[1, 0], [0, 1]], "step": 0.5, "blob": "b'x'", "map": {"kept": 2}}


def test_a_series_without_frames_or_end(path: Path) -> None:
    record(path, start_of(), [])
    with open_recording(path) as recording:
        assert (recording.frames, recording.complete, recording.end) == (0, False, None)
        assert recording.start.scan_shape is recording.start.frames is None
        assert list(recording.blocks()) == []
        assert ("end", "no end message: the series was cut off") in recording.describe()


def test_another_series_is_a_mistake_of_the_caller(path: Path) -> None:
    with Recorder(path, start_of(), "native", "1") as recorder, pytest.raises(ValueError, match="series 8"):
        recorder.write(block_of([b"\0" * 240], Encoding.RAW, series=8))
    recorder.close()  # harmless
    with pytest.raises(ValueError, match="closed"):
        recorder.write(block_of([b"\0" * 240], Encoding.RAW))


# what can go wrong with files


def test_an_existing_file_is_not_replaced(path: Path) -> None:
    record(path, start_of(), [block_of([b"\0" * 240], Encoding.RAW)])
    before = path.read_bytes()
    with pytest.raises(DataFileError, match="the file exists"):
        Recorder(path, start_of(), "native", "1")
    assert path.read_bytes() == before
    with Recorder(path, start_of(), "native", "1", overwrite=True):
        pass
    with open_recording(path) as recording:
        assert recording.frames == 0


@pytest.mark.parametrize("overwrite", [False, True])
def test_places_where_no_recording_can_be_made(tmp_path: Path, overwrite: bool) -> None:
    for where, text in ((tmp_path / "none" / "r.h5", f"no directory {tmp_path / 'none'}"), (tmp_path, "a directory")):
        with pytest.raises(DataFileError, match=re.escape(text)):
            Recorder(where, start_of(), "native", "1", overwrite=overwrite)
    if os.geteuid() != 0:  # nothing is forbidden to root
        tmp_path.chmod(0o500)
        with pytest.raises(DataFileError, match="not permitted"):
            Recorder(tmp_path / "r.h5", start_of(), "native", "1", overwrite=overwrite)
        tmp_path.chmod(0o700)


def test_a_frame_too_large_for_hdf5_leaves_no_file(path: Path) -> None:
    with pytest.raises(DataFileError, match="a frame of 17 GB cannot be recorded"):
        Recorder(path, start_of("<u4", detector_shape=(65536, 65536)), "native", "1")
    assert not path.exists()


def _fill_the_disk(path: Path, limit: int) -> None:
    """In a child: record until no more fits, and check that this is said at once, again, and not a third time."""
    frames = frames_of("<u2", 50, (64, 64))
    block = block_of([frame.tobytes() for frame in frames], Encoding.RAW)
    with Recorder(path, start_of(detector_shape=(64, 64)), "native", "1") as recorder:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        recorder.write(block)
        recorder.flush()
        with pytest.raises(DataFileError, match=r"recording failed \(File too large\)"):
            for _ in range(10):
                recorder.write(block)
        for call in (lambda: recorder.write(block), recorder.flush, lambda: recorder.end(None)):
            with pytest.raises(DataFileError, match="recording failed"):
                call()
    recorder.close()


def test_a_full_disk_is_said_and_keeps_what_was_written(path: Path, child: Callable[..., int]) -> None:
    limit = 1_000_000
    assert child(_fill_the_disk, path, limit) == 0
    assert path.stat().st_size <= limit
    with open_recording(path) as recording:
        assert recording.frames >= 50
        assert not recording.complete
        pixels = b"".join(payload for _, _, payload, _ in items_of(recording.blocks()))
    assert pixels[: 50 * 8192] == frames_of("<u2", 50, (64, 64)).tobytes()


def _close_on_a_full_disk(path: Path) -> None:
    with pytest.raises(DataFileError, match="recording failed"), Recorder(path, start_of(), "native", "1") as recorder:
        payload = frames_of("<u2", 1)[0].tobytes()
        recorder.write(block_of([payload] * 500, Encoding.RAW))
        size = path.stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_disk_that_is_full_at_the_end_is_said_too(path: Path, child: Callable[..., int]) -> None:
    assert child(_close_on_a_full_disk, path) == 0


def _die_while_recording(path: Path, encoding: Encoding) -> None:
    payloads = [encode(frame, encoding) for frame in frames_of("<u2", 10)]
    recorder = Recorder(path, start_of(channels=CHANNELS[:2]), "native", "1")

    def write(payloads: Sequence[bytes], **options: Any) -> None:
        block = block_of(payloads, encoding, **options)
        recorder.write(replace(block, others=(block,), exposed_ns=block.indices))

    for i in range(20):
        write(payloads, first=i * 10, time_ns=i)
    recorder.undecodable(2)
    write([b"damaged"], first=200, time_ns=20)
    recorder.flush()
    write(payloads, first=201, time_ns=21)  # not flushed: these may be lost
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("encoding", [Encoding.RAW, Encoding.BSLZ4])
def test_a_killed_recorder_leaves_a_readable_file(path: Path, child: Callable[..., int], encoding: Encoding) -> None:
    assert child(_die_while_recording, path, encoding) == -signal.SIGKILL
    frames = frames_of("<u2", 10)
    assert is_recording(path)
    with open_recording(path) as recording:
        assert 201 <= recording.frames <= 211
        assert not recording.complete
        assert (recording.undecodable_messages, recording.damaged_frames) == (2, 1)
        blocks = list(recording.blocks())
        items = items_of(blocks)
    assert items_of([block.channel(1) for block in blocks]) == items
    assert all(np.array_equal(block.exposed_ns, block.indices) for block in blocks)  # type: ignore[arg-type]
    for i, (got, index, payload, time_ns) in enumerate(items[:200]):
        assert (got, index, time_ns) == (encoding, i, i // 10)
        assert decode(payload, got, SHAPE, np.dtype("<u2")).tobytes() == frames[i % 10].tobytes()
    assert items[200][2] == b"damaged"
    with h5py.File(path, swmr=True) as file:  # what any other program would do
        np.testing.assert_array_equal(file["frames"][:200], np.tile(frames, (20, 1, 1)))
    # Copied incompletely: HDF5 itself would read zeros.
    for keep in (0.97, 0.9, 0.5, 0.1):
        copy = path.with_name("copy.h5")
        copy.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
        with pytest.raises(DataFileError, match=r"copy\.h5: .*copy .*again"), open_recording(copy) as recording:
            assert items_of(recording.blocks()) != []


def test_a_recording_can_be_read_while_it_is_written(path: Path) -> None:
    payloads = [frame.tobytes() for frame in frames_of("<u2", 10)]
    with Recorder(path, start_of(), "native", "1") as recorder:
        for i in range(3):
            recorder.write(block_of(payloads, Encoding.RAW, first=10 * i))
            recorder.flush()
            copy = shutil.copy(path, path.with_name(f"copy{i}.h5"))
            with open_recording(copy) as recording:
                assert recording.frames == 10 * (i + 1)
                assert [item[2] for item in items_of(recording.blocks())] == payloads * (i + 1)


def test_a_truncated_recording_says_so(path: Path) -> None:
    payloads = [encode(frame, Encoding.BSLZ4) for frame in frames_of("<u2", 100)]
    record(path, start_of(), [block_of(payloads, Encoding.BSLZ4)], SeriesEnd(7, (b"end",)))
    whole = path.read_bytes()
    for keep in np.linspace(0, len(whole) - 1, 40).astype(int):
        path.write_bytes(whole[:keep])
        with pytest.raises(DataFileError, match=r"recording\.h5: .*(copy .*again|something else)"):
            open_recording(path)


def test_a_damaged_recording_says_so_or_still_works(path: Path) -> None:
    payloads = [encode(frame, Encoding.BSLZ4) for frame in frames_of("<u2", 50)]
    record(path, start_of(), [block_of(payloads, Encoding.BSLZ4)], SeriesEnd(7, (b"end",)))
    whole = path.read_bytes()
    rng = np.random.default_rng(5)
    for at in rng.integers(0, len(whole), 300):
        path.write_bytes(whole[:at] + rng.bytes(16) + whole[at + 16 :])
        is_recording(path)
        try:
            with open_recording(path) as recording:
                recording.describe()
                assert len(items_of(recording.blocks())) == recording.frames
        except DataFileError as error:
            assert "recording.h5: " in str(error)  # noqa: PT017 - either outcome is right


def test_what_is_not_a_recording(tmp_path: Path, path: Path) -> None:
    (tmp_path / "text.h5").write_text("not HDF5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["data"] = np.zeros((2, 2, 4, 4))
    record(path, start_of(), [])
    assert is_recording(path)
    for name in ("text.h5", "other.h5", "missing.h5", "."):
        assert not is_recording(tmp_path / name)
        with pytest.raises(DataFileError, match=re.escape(str(tmp_path / name))):
            open_recording(tmp_path / name)


def test_recordings_of_the_future_and_changed_ones(path: Path) -> None:
    def changed(change: Callable[[Any], None]) -> str:
        path.unlink(missing_ok=True)
        record(
            path,
            start_of(),
            [block_of([encode(frame, Encoding.BSLZ4) for frame in frames_of("<u2", 3)], Encoding.BSLZ4)],
        )
        with h5py.File(path, "r+") as file:
            change(file)
        with pytest.raises(DataFileError) as caught, open_recording(path) as recording:
            list(recording.blocks())
        return str(caught.value)

    def repack(file: Any) -> None:
        frames = file["frames"][...]
        del file["frames"]
        file.create_dataset("frames", data=frames, compression="gzip", chunks=(1, *SHAPE))

    assert "version 3" in changed(lambda file: file.attrs.update({"version": 3}))
    assert "another program has changed it" in changed(repack)
    assert "failed" in changed(lambda file: file.pop("frame_index"))
    assert "failed" in changed(lambda file: file.attrs.update({"settings": "{"}))
    assert "different lengths" in changed(lambda file: file["arrival_time_ns"].resize(2, axis=0))
    assert "different lengths" in changed(lambda file: file["encoding"].resize(2, axis=0))
    assert "failed" in changed(lambda file: file["encoding"].write_direct(np.uint8([2, 99, 2])))
    assert "repacked" in changed(lambda file: file["encoding"].write_direct(np.uint8([2, 1, 2])))
    assert "failed" in changed(lambda file: file.attrs.update({"channels": '["a", "b"]'}))
    assert "frame 1 of 3 cannot be read" in changed(_without_a_chunk)


def _without_a_chunk(file: Any) -> None:
    mask, chunk = file["frames"].id.read_direct_chunk((0, 0, 0))
    file["frames"].resize(1, axis=0)
    file["frames"].resize(3, axis=0)
    file["frames"].id.write_direct_chunk((2, 0, 0), chunk, mask)


# which payloads are whole


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_the_check_accepts_what_the_libraries_unpack(data: st.DataObject) -> None:
    encoding = data.draw(st.sampled_from(Encoding))
    bits = MERLIN_BITS.get(encoding)
    # Merlin's words want columns, its four chips rows of their own.
    unit = 1 if bits is None else data.draw(st.sampled_from([1, 64, 128]))
    dtype = np.dtype(data.draw(st.sampled_from(DTYPES if bits is None else ("<u1", "<u2"))))
    shape = (data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70 if bits is None else 4)) * unit)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    frame = rng.poisson(data.draw(st.sampled_from([0.02, 0.5, 300])), shape).astype(dtype)
    if bits is None:
        payload = bytearray(encode(frame, encoding))
    else:
        payload = bytearray(rng.bytes(frame.nbytes // (8 if bits == 1 else 1) or 1))
    damage = data.draw(st.sampled_from(["none", "cut", "changed", "longer"]))
    if damage == "cut":
        del payload[rng.integers(0, len(payload)) :]
    elif damage == "changed":
        payload[rng.integers(0, len(payload))] = rng.integers(0, 256)
    elif damage == "longer":
        payload += rng.bytes(rng.integers(1, 9))
    try:
        decode(bytes(payload), encoding, shape, dtype)
        expected = True
    except ProtocolError:
        expected = False
    assert whole_frames(block_of([bytes(payload)], encoding), shape, dtype).tolist() == [expected]


def test_the_check_never_looks_beyond_the_slab() -> None:
    slab = np.frombuffer(struct.pack(">QII", 240, 8192, 4), np.uint8)
    for encoding in Encoding:
        offsets, sizes = np.array([-1, 0, 8, 0, 99]), np.array([16, 17, 240, -1, 0])
        block = FrameBlock(7, encoding, np.arange(5), offsets, sizes, slab)
        assert not whole_frames(block, SHAPE, np.dtype("<u2")).any()


def test_types_are_what_they_say(path: Path) -> None:
    record(path, start_of(), [block_of([b"\0" * 240], Encoding.RAW)])
    with open_recording(path) as recording:
        assert isinstance(recording, Recording)
        (block,) = recording.blocks()
    assert (block.indices.dtype, block.offsets.dtype, block.sizes.dtype) == (np.int64, np.int64, np.int64)
    assert block.slab.dtype == np.uint8
