"""Files of DECTRIS' FileWriter: both layouts, made here with h5py, and a real one where it is at hand."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cbor2
import h5py
import hdf5plugin
import numpy as np
import pytest
import zmq
import zmq.asyncio

import stream
from detectors import codec
from detectors.errors import ConfigurationError, DataFileError
from detectors.messages import Encoding, FrameBlock, ReceivedBatch, SeriesStart
from detectors.protocols.registry import protocol_named
from detectors.simulator.sender import serve
from stream.config import Layer
from stream.files import Dataset4D, open_dataset
from stream.offline import StoredFrames, describe_file, file_source, file_start, reconstruct_file
from stream.result import Result
from tests.data_helpers import SHARED_DATA, Case
from tests.dectris_files import BITSHUFFLE_LZ4, COUNTS, DETECTOR, SCAN, payloads, write_legacy

MASK = np.zeros(DETECTOR, np.uint32)
MASK[2, 3], MASK[4, 5], MASK[6, 7] = 1, 1 << 8, 2  # a gap, a pixel that is only commented on, a dead one

FILTERS = {
    "bslz4": (BITSHUFFLE_LZ4, Encoding.BSLZ4),
    "lz4": (hdf5plugin.LZ4(), Encoding.LZ4_BLOCKS),
    "zstd": (hdf5plugin.Bitshuffle(cname="zstd"), None),
    "shuffled only": (hdf5plugin.Bitshuffle(cname="none"), None),
    "gzip": ({"compression": "gzip"}, None),
    "two filters": ({**BITSHUFFLE_LZ4, "fletcher32": True}, None),
    "none": ({}, None),
}


def write_2024(
    folder: Path, channels: dict[str, np.ndarray], per_file: int = 20, *, separate: bool = False, odd: bool = False
) -> Path:
    """A master file with a virtual dataset (images, channels, rows, columns). ``per_file`` 0: all in the master.

    ``separate``: each channel in a 3-D dataset of its own; ``odd``: the rows of two images mixed in the data files.
    """
    path = folder / "scan_master.h5"
    counts = np.stack(list(channels.values()), axis=1)
    chunks = (1, 1, *counts.shape[2:])
    with h5py.File(path, "w") as master:
        group = master.create_group("entry/data")
        group["channel"] = list(channels)
        group["image_id"] = np.arange(1, len(counts) + 1)
        group["start_time"] = np.arange(len(counts)) * 1e-4
        detector = master.create_group("entry/instrument/detector")
        detector["description"] = "Dectris ARINA"
        detector["frame_time"] = 1e-4
        detector["flatfield_applied"] = np.int8(0)
        master["entry/instrument/beam/incident_energy"] = np.array([200e3])
        for number, name in enumerate(channels):
            detector[f"{name}_channel/threshold_energy"] = 1e4 * (number + 1)
            detector[f"{name}_channel/pixel_mask"] = MASK if number else np.zeros_like(MASK)
            detector[f"{name}_channel/flatfield"] = np.full(DETECTOR, 1.0 + number, np.float32)
        if not per_file:
            group.create_dataset("data", data=counts, chunks=chunks, **BITSHUFFLE_LZ4)
            return path
        layout = h5py.VirtualLayout(counts.shape, counts.dtype)
        for number, first in enumerate(range(0, len(counts), per_file), 1):
            part = counts[first : first + per_file]
            name = f"scan_data_{number:06d}.h5"
            with h5py.File(folder / name, "w") as file:
                if separate:
                    for channel in range(part.shape[1]):
                        data = file.create_dataset(
                            f"of_{channel}", data=part[:, channel], chunks=(1, *chunks[2:]), **BITSHUFFLE_LZ4
                        )
                        layout[first : first + len(part), channel] = h5py.VirtualSource(data)
                elif odd:
                    data = file.create_dataset("data", data=part[::-1], chunks=chunks, **BITSHUFFLE_LZ4)
                    for i in range(len(part)):
                        layout[first + i, :, :9] = h5py.VirtualSource(data)[len(part) - 1 - i, :, :9]
                        layout[first + i, :, 9:] = h5py.VirtualSource(data)[len(part) - 1 - i, :, 9:]
                else:
                    data = file.create_dataset("data", data=part, chunks=chunks, **BITSHUFFLE_LZ4)
                    layout[first : first + len(part)] = h5py.VirtualSource(data)
        group.create_virtual_dataset("data", layout)
    return path


def write_own(path: Path, counts: np.ndarray, mask: np.ndarray | None = None) -> Path:
    """The same frames in liveptycho's own layout."""
    with h5py.File(path, "w") as file:
        file["data"] = counts.reshape(*SCAN, *counts.shape[1:])
        file.attrs["energy_eV"] = 200e3
        if mask is not None:
            file["pixel_mask"] = mask
    return path


def decoded(data: Dataset4D) -> np.ndarray:
    return np.concatenate([frames for _, frames in data.blocks(max_bytes=5 * COUNTS[0].nbytes)])


def unpacked(blocks: Sequence[FrameBlock], start: SeriesStart) -> np.ndarray:
    frames = [codec.decode(p, b.encoding, start.detector_shape, start.dtype) for b in blocks for p in payloads(b)]
    return np.stack(frames)


def chunks_of(folder: Path) -> list[bytes]:
    """What is in the data files of the older layout, as HDF5 gives it."""
    found = []
    for path in sorted(folder.glob("*_data_*.h5")):
        with h5py.File(path) as file:
            data = file["entry/data/data"]
            found += [data.id.read_direct_chunk((i, 0, 0))[1] for i in range(len(data))]
    return found


# ---- the older layout ----


@pytest.mark.parametrize("dtype", ["<u1", "<u2", "<u4"])
@pytest.mark.parametrize("name", FILTERS)
def test_frames_of_a_master_file(tmp_path: Path, name: str, dtype: str) -> None:
    filters, encoding = FILTERS[name]
    counts = COUNTS.astype(dtype)
    with open_dataset(write_legacy(tmp_path, counts, filters=filters)) as data:
        assert data.layout == "DECTRIS master file"
        assert data.frames == len(counts)
        assert data.detector_shape == DETECTOR
        assert data.dtype == np.dtype(dtype)
        assert data.protocol == "dectris-v2"
        assert data.maximum_is_masked
        np.testing.assert_array_equal(decoded(data), counts)
        blocks = list(data.packed_blocks(max_bytes=5 * counts[0].nbytes))
        assert {block.encoding for block in blocks} == {encoding or Encoding.RAW}
        assert data.as_stored == (encoding is not None)
        np.testing.assert_array_equal(np.concatenate([b.indices for b in blocks]), np.arange(len(counts)))
        np.testing.assert_array_equal(unpacked(blocks, file_start(data)), counts)
        if encoding is not None:
            assert [p for b in blocks for p in payloads(b)] == chunks_of(tmp_path)


def test_a_whole_frame_chunk_of_any_hdf5_file_is_passed_on(tmp_path: Path) -> None:
    counts = COUNTS.reshape(*SCAN, *DETECTOR)
    with h5py.File(tmp_path / "scan.h5", "w") as file:
        file.create_dataset("data", data=counts, chunks=(1, 1, *DETECTOR), **BITSHUFFLE_LZ4)
        stored = [file["data"].id.read_direct_chunk((i // 7, i % 7, 0, 0))[1] for i in range(42)]
    with open_dataset(tmp_path / "scan.h5") as data:
        blocks = list(data.packed_blocks(max_bytes=10 * COUNTS[0].nbytes))
        assert [p for b in blocks for p in payloads(b)] == stored
        assert data.encoding is Encoding.BSLZ4


@pytest.mark.parametrize("change", [{"chunks": (1, 2, *DETECTOR)}, {"dtype": ">u2"}, {"dtype": "<i2"}])
def test_what_streams_cannot_say_is_decoded(tmp_path: Path, change: dict[str, Any]) -> None:
    counts = COUNTS.reshape(*SCAN, *DETECTOR)
    options = {"chunks": (1, 1, *DETECTOR), **BITSHUFFLE_LZ4, "dtype": "<u2", **change}
    with h5py.File(tmp_path / "scan.h5", "w") as file:
        file.create_dataset("data", data=counts, **options)
    with open_dataset(tmp_path / "scan.h5") as data:
        assert not data.as_stored
        np.testing.assert_array_equal(unpacked(list(data.packed_blocks()), file_start(data)), COUNTS)


@pytest.mark.parametrize("name", ["bslz4", "lz4"])
def test_holes_and_chunks_without_filter_are_packed(tmp_path: Path, name: str) -> None:
    filters, encoding = FILTERS[name]
    path = write_legacy(tmp_path, filters=filters, per_file=1000)
    with h5py.File(tmp_path / "scan_data_000001.h5", "w") as file:
        data = file.create_dataset("entry/data/data", COUNTS.shape, "<u2", chunks=(1, *DETECTOR), **filters)
        for i in range(len(COUNTS)):
            if i not in (4, 9):
                data[i] = COUNTS[i]
        data.id.write_direct_chunk((9, 0, 0), COUNTS[9].tobytes(), filter_mask=1)
    expected = COUNTS.copy()
    expected[4] = 0
    with open_dataset(path) as opened:
        blocks = list(opened.packed_blocks())
        assert {block.encoding for block in blocks} == {encoding}
        np.testing.assert_array_equal(unpacked(blocks, file_start(opened)), expected)


def test_a_damaged_data_file_is_named(tmp_path: Path) -> None:
    path = write_legacy(tmp_path)
    with h5py.File(tmp_path / "scan_data_000002.h5") as file:
        where = file["entry/data/data"].id.get_chunk_info(3)
    content = bytearray((tmp_path / "scan_data_000002.h5").read_bytes())
    (tmp_path / "scan_data_000002.h5").write_bytes(content[: where.byte_offset])
    with pytest.raises(DataFileError, match=r"scan_data_000002.h5: .*truncated or damaged"):
        open_dataset(path)


@pytest.mark.parametrize(
    ("numbers", "expected", "note"),
    [
        ([1, 21, 41], list(range(42)), None),
        ([101, 121, 141], list(range(42)), None),
        ([0, 0, 0], list(range(42)), None),
        ([1, 1, 1], list(range(42)), "contradict each other"),
        ([1, 31, 51], [*range(20), *range(30, 52)], "10 of 52 images are in none"),
    ],
)
def test_image_numbers(tmp_path: Path, numbers: list[int], expected: list[int], note: str | None) -> None:
    with open_dataset(write_legacy(tmp_path, numbers=numbers)) as data:
        blocks = list(data.packed_blocks())
        assert np.concatenate([b.indices for b in blocks]).tolist() == expected
        assert [first + i for first, frames in data.blocks() for i in range(len(frames))] == expected
        assert data.frames == expected[-1] + 1
        assert any(note in text for text in data.notes) if note else not data.notes


def test_more_than_999999_files_are_in_their_order(tmp_path: Path) -> None:
    path = write_legacy(tmp_path, per_file=21, numbers=[0, 0])
    with h5py.File(path, "r+") as file:
        file.move("entry/data/data_000001", "entry/data/data_999999")
        file.move("entry/data/data_000002", "entry/data/data_1000000")
    with open_dataset(path) as data:
        np.testing.assert_array_equal(decoded(data), COUNTS)


def test_a_missing_data_file_is_named(tmp_path: Path) -> None:
    path = write_legacy(tmp_path)
    (tmp_path / "scan_data_000002.h5").unlink()
    with pytest.raises(DataFileError, match=r"the frames are in scan_data_000002.h5, which is missing"):
        open_dataset(path)


def test_all_images_in_the_master_file(tmp_path: Path) -> None:
    path = tmp_path / "scan_master.h5"
    with h5py.File(path, "w") as file:
        file["entry/instrument/detector/detectorSpecific/nimages"] = 42
        file.create_dataset("entry/data/data", data=COUNTS, chunks=(1, *DETECTOR), **BITSHUFFLE_LZ4)
    with open_dataset(path) as data:
        assert data.layout == "DECTRIS master file"
        np.testing.assert_array_equal(decoded(data), COUNTS)
        assert data.encoding is Encoding.BSLZ4


def test_a_master_file_without_frames(tmp_path: Path) -> None:
    with pytest.raises(DataFileError, match="aborted before its first frame"):
        open_dataset(write_legacy(tmp_path, COUNTS[:0]))


def test_data_files_that_differ(tmp_path: Path) -> None:
    path = write_legacy(tmp_path)
    with h5py.File(tmp_path / "scan_data_000002.h5", "r+") as file:
        del file["entry/data/data"]
        file["entry/data/data"] = COUNTS[20:40, :8]
    with pytest.raises(DataFileError, match="frames of different kinds"):
        open_dataset(path)


def test_a_data_file_alone(tmp_path: Path) -> None:
    write_legacy(tmp_path)
    with open_dataset(tmp_path / "scan_data_000002.h5") as data:
        assert data.layout == "DECTRIS data file"
        assert data.maximum_is_masked
        np.testing.assert_array_equal(decoded(data), COUNTS[20:40])


def test_other_nexus_files_are_not_taken_for_dectris(tmp_path: Path) -> None:
    path = tmp_path / "scan.nxs"
    with h5py.File(path, "w") as file:
        file["entry/data/data"] = COUNTS.reshape(*SCAN, *DETECTOR)
        file["entry/instrument/detector/description"] = "somebody else's"
    with open_dataset(path) as data:
        assert data.scan_shape == SCAN
        assert not data.maximum_is_masked


# ---- the newer layout ----

TWO = {"threshold_1": COUNTS, "threshold_2": COUNTS // 2}


@pytest.mark.parametrize(
    ("options", "as_stored"),
    [({}, True), ({"per_file": 0}, True), ({"separate": True}, True), ({"odd": True}, False)],
    ids=["files", "master alone", "a dataset a channel", "mixed up"],
)
def test_channels(tmp_path: Path, options: dict[str, Any], as_stored: bool) -> None:
    with open_dataset(write_2024(tmp_path, TWO, **options)) as data:
        assert data.channels == ("threshold_1", "threshold_2")
        assert data.frames == len(COUNTS)
        assert data.as_stored == as_stored
        np.testing.assert_array_equal(decoded(data), COUNTS)
        blocks = list(data.packed_blocks(max_bytes=9 * COUNTS[0].nbytes))
        start = file_start(data)
        np.testing.assert_array_equal(unpacked(blocks, start), COUNTS)
        np.testing.assert_array_equal(unpacked([b.others[0] for b in blocks], start), COUNTS // 2)
        np.testing.assert_array_equal(np.concatenate([b.exposed_ns for b in blocks]), np.arange(len(COUNTS)) * 100_000)
        assert data.settings["threshold_energy_ev"] == {"threshold_1": 1e4, "threshold_2": 2e4}
        assert data.settings["energy_kev"] == 200.0
        assert data.settings["flatfield_applied"] is False
        assert data.settings["frame_time_s"] == 1e-4
        assert (~data.pixel_mask).sum() == 2  # of all channels together
        np.testing.assert_array_equal(data.flatfield, np.ones(DETECTOR))


@pytest.mark.parametrize("name", ["threshold_2", "2"])
def test_one_channel(tmp_path: Path, name: str) -> None:
    with open_dataset(write_2024(tmp_path, TWO), name) as data:
        assert data.channels == ("threshold_2",)
        np.testing.assert_array_equal(decoded(data), COUNTS // 2)
        np.testing.assert_array_equal(unpacked(list(data.packed_blocks()), file_start(data)), COUNTS // 2)


@pytest.mark.parametrize("name", ["threshold_3", "0", "3"])
def test_an_unknown_channel(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataFileError, match="has the channels threshold_1, threshold_2, not"):
        open_dataset(write_2024(tmp_path, TWO), name)


def test_a_missing_source_of_the_virtual_dataset(tmp_path: Path) -> None:
    path = write_2024(tmp_path, TWO)
    (tmp_path / "scan_data_000003.h5").unlink()
    with pytest.raises(DataFileError, match=r"scan_data_000003.h5, which is missing"):
        open_dataset(path)


# ---- what the file says of detector and scan ----


def test_the_detectors_own_words(tmp_path: Path) -> None:
    path = write_legacy(
        tmp_path,
        pixel_mask=MASK,
        flatfield=np.full(DETECTOR, 2.0, np.float32),
        eiger_fw_version=np.bytes_("release-2022.1"),
        trigger_mode=np.bytes_("exts"),
    )
    with h5py.File(path, "r+") as file:
        file["entry/instrument/detector/frame_time"] = 5e-5
        file["entry/instrument/detector/flatfield_correction_applied"] = np.int8(1)
    with open_dataset(path) as data:
        assert np.argwhere(~data.pixel_mask).tolist() == [[2, 3], [6, 7]]
        np.testing.assert_array_equal(data.flatfield, np.full(DETECTOR, 2.0))
        assert data.settings == {
            "detector": "Dectris ARINA",
            "firmware": "release-2022.1",
            "trigger_mode": "exts",
            "frame_time_s": 5e-5,
            "flatfield_applied": True,
            "energy_kev": 200.0,
        }
        assert ("bad pixels", "2 of 384") in data.describe()


def test_a_mask_that_does_not_fit_is_a_note(tmp_path: Path) -> None:
    with open_dataset(write_legacy(tmp_path, pixel_mask=MASK[1:])) as data:
        assert data.pixel_mask is None
        assert "pixel mask of 15 x 24 pixels does not fit" in data.notes[0]


def test_a_mask_without_a_good_pixel_is_a_note(tmp_path: Path) -> None:
    with open_dataset(write_legacy(tmp_path, pixel_mask=np.ones(DETECTOR, np.uint32))) as data:
        assert data.pixel_mask is None
        assert "every pixel bad" in data.notes[0]


def test_scan_shape_of_a_line_trigger(tmp_path: Path) -> None:
    with open_dataset(write_legacy(tmp_path, nimages=np.uint64(7), ntrigger=np.uint64(6))) as data:
        assert data.scan_shape == (6, 7)
        assert data.settings["frames_per_trigger"] == 7


def test_a_series_cut_short_is_a_note(tmp_path: Path) -> None:
    with open_dataset(write_legacy(tmp_path, ntrigger=50)) as data:
        assert "was set to take 50 images, the file has 42" in data.notes[0]


def write_novena(folder: Path, **attributes: Any) -> None:
    with h5py.File(folder / "scan.h5", "w") as file:
        group = file.create_group("STEM Metadata")
        known = {"NumPixelsX": 7, "NumPixelsY": np.array([6]), "High Tension": np.array([300e3]), **attributes}
        group.attrs.update(known)


def test_novenas_side_file(tmp_path: Path) -> None:
    write_novena(tmp_path, **{"Pixel Size": [0.05], "IsPixelSizeCalibrated": np.uint8(1), "NumPixelsPrescan": 3})
    with open_dataset(write_legacy(tmp_path)) as data:
        assert data.scan_shape == SCAN
        assert data.settings["energy_kev"] == 300.0
        assert data.settings["scan_step_angstrom"] == pytest.approx([0.5, 0.5])
        said = " ".join(data.notes)
        assert "the detector was set to 200 keV, the microscope to 300 keV" in said
        assert "taken to be in nm" in said
        assert "3 prescan positions" in said


def test_an_uncalibrated_pixel_size_is_only_told(tmp_path: Path) -> None:
    write_novena(tmp_path, **{"Pixel Size": [0.05], "Rotation": 12.0})
    with open_dataset(write_legacy(tmp_path)) as data:
        assert "scan_step_angstrom" not in data.settings
        assert "scan_step_angstrom = 0.5" in " ".join(data.notes)
        assert "'Rotation' = 12" in " ".join(data.notes)


@pytest.mark.parametrize("attributes", [{"NumPixelsX": 0}, {"NumPixelsX": "many"}, {"NumPixelsX": 1e9}])
def test_nonsense_in_the_side_file(tmp_path: Path, attributes: dict[str, Any]) -> None:
    write_novena(tmp_path, **attributes)
    with open_dataset(write_legacy(tmp_path)) as data:
        assert data.scan_shape is None


def test_a_damaged_side_file_is_a_note(tmp_path: Path) -> None:
    (tmp_path / "scan.h5").write_bytes(b"once upon a time")
    with open_dataset(write_legacy(tmp_path)) as data:
        assert "scan.h5" in data.notes[0]


def test_a_data_file_alone_does_not_fill_the_scan(tmp_path: Path) -> None:
    write_novena(tmp_path)
    write_legacy(tmp_path)
    with open_dataset(tmp_path / "scan_data_000002.h5") as data:
        assert data.scan_shape is None
        assert "holds a part" in " ".join(data.notes)


def test_ncems_side_file(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "scan_em_metadata.h5", "w") as file:
        group = file.create_group("electron_microscope")
        scan = group.create_group("scan_controller/regular_scan")
        scan["n_pixels_x"], scan["n_pixels_y"] = 7, 6
        scan["pixel_size_x"], scan["pixel_size_y"] = 0.04, "0.05 nm"
        scan["pixel_size_x"].attrs["units"] = "nm"
        group["electron_source/accelerating_voltage"] = 80.0
        group["electron_source/accelerating_voltage"].attrs["units"] = "kV"
        group["illumination_system/semi_convergence_angle"] = "0.02 rad"
    with open_dataset(write_legacy(tmp_path)) as data:
        assert data.scan_shape == SCAN
        assert data.settings["scan_step_angstrom"] == pytest.approx([0.5, 0.4])
        assert data.settings["energy_kev"] == pytest.approx(80.0)
        assert data.settings["semiangle_mrad"] == pytest.approx(20.0)


def test_the_real_file() -> None:
    folder = SHARED_DATA / "streams" / "arina_h5"
    if not folder.exists():
        pytest.skip(f"needs the ARINA file in {folder}")
    with open_dataset(folder / "test_00_master.h5") as data:
        assert data.scan_shape == (4, 4)
        assert data.detector_shape == (192, 192)
        assert data.dtype == np.dtype("<u4")
        assert data.settings["energy_kev"] == 300.0
        assert data.settings["firmware"] == "release-2024.1"
        assert data.encoding is Encoding.BSLZ4
        assert data.pixel_mask.all()
        (block,) = data.packed_blocks()
        with h5py.File(folder / "test_00_data_000001.h5") as file:
            stored = file["entry/data/data"]
            assert payloads(block) == [stored.id.read_direct_chunk((i, 0, 0))[1] for i in range(16)]
            np.testing.assert_array_equal(decoded(data), stored[()])
        np.testing.assert_array_equal(unpacked([block], file_start(data)), 0)


# ---- through the program ----

CASE = Case(scan=SCAN, detector=DETECTOR)
LAYERS = [Layer.of("flag", CASE.settings)]


def assert_same_object(one: Result, other: Result) -> None:
    """Equal up to the rounding of complex64 sums, whose order depends on how the rows come together."""
    np.testing.assert_allclose(one.object, other.object, rtol=0, atol=3e-7)


def test_reconstruction_equals_that_of_the_own_layout(tmp_path: Path) -> None:
    counts = CASE.counts().reshape(-1, *DETECTOR)
    master = write_legacy(tmp_path, counts, pixel_mask=MASK)
    own = write_own(tmp_path / "own.h5", counts, (MASK & 31) == 0)
    one, other = reconstruct_file(master, LAYERS), reconstruct_file(own, LAYERS)
    assert_same_object(one, other)
    for name in ("bright_field", "dark_field", "mean_pattern"):
        np.testing.assert_array_equal(one.images[name], other.images[name])
    assert not one.setup.geometry.good[2, 3]
    assert one.counters.received == len(counts)


def test_pixels_at_the_maximum_are_no_counts(tmp_path: Path) -> None:
    hot, dark = COUNTS.copy(), COUNTS.copy()
    hot[5, 1, 2], dark[5, 1, 2] = np.iinfo("<u2").max, 0
    (tmp_path / "dark").mkdir()
    one = reconstruct_file(write_legacy(tmp_path, hot), LAYERS)
    other = reconstruct_file(write_legacy(tmp_path / "dark", dark), LAYERS)
    assert_same_object(one, other)


@pytest.mark.parametrize(("channel", "counts"), [("threshold_2", COUNTS // 2), ("threshold_1-threshold_2", None)])
def test_reconstruction_of_a_channel(tmp_path: Path, channel: str, counts: np.ndarray | None) -> None:
    wanted = COUNTS - COUNTS // 2 if counts is None else counts
    own = write_own(tmp_path / "own.h5", wanted, (MASK & 31) == 0)
    result = reconstruct_file(write_2024(tmp_path, TWO), [Layer.of("flag", {**CASE.settings, "channel": channel})])
    assert_same_object(result, reconstruct_file(own, LAYERS))


def test_the_users_mask_is_laid_over_the_files(tmp_path: Path) -> None:
    mask = np.ones(DETECTOR, np.uint8)
    mask[0, 0] = 0
    np.save(tmp_path / "mask.npy", mask)
    layers = [Layer.of("flag", {**CASE.settings, "pixel_mask": str(tmp_path / "mask.npy")})]
    good = reconstruct_file(write_legacy(tmp_path, pixel_mask=MASK), layers).setup.geometry.good
    assert np.argwhere(~good).tolist() == [[0, 0], [2, 3], [6, 7]]


def test_description(tmp_path: Path) -> None:
    write_novena(tmp_path)
    settings = {key: value for key, value in CASE.settings.items() if key not in ("scan_shape", "energy_kev")}
    description = describe_file(write_legacy(tmp_path), [Layer.of("flag", settings)])
    assert ("layout", "DECTRIS master file") in description.rows
    assert description.parameters is not None
    assert description.parameters.values["scan_shape"] == SCAN
    assert description.parameters.sources["energy_kev"] == "file"


def test_in_python(tmp_path: Path) -> None:
    with stream.open_dataset(write_legacy(tmp_path)) as data:
        assert isinstance(data, stream.Dataset4D)


# ---- sent again ----


async def sent_messages(source: Any, protocol: str) -> list[list[bytes]]:
    """Every message of one series over a real socket."""
    endpoint: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    sending = asyncio.create_task(
        serve(source, "tcp://127.0.0.1:*", protocol=protocol, frames_per_message=4, ready=endpoint.set_result)
    )
    context = zmq.asyncio.Context()
    socket = context.socket(zmq.PULL)
    try:
        socket.connect(await endpoint)
        found: list[list[bytes]] = []
        while not sending.done() or await socket.poll(100):
            if await socket.poll(50):
                found.append(await socket.recv_multipart())
        await sending
        return found
    finally:
        socket.close(linger=0)
        context.term()


@pytest.mark.parametrize("name", ["bslz4", "lz4"])
async def test_a_file_is_replayed_as_a_v2_stream_without_decoding(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_legacy(tmp_path, filters=FILTERS[name][0])

    def forbidden(*_: Any) -> None:
        raise AssertionError("a frame was decoded or packed")

    for function in ("encode", "decode"):
        monkeypatch.setattr(codec, function, forbidden)
    monkeypatch.setattr("stream.files.chunks.encode", forbidden)
    with open_dataset(path) as data:
        source = file_source(data, protocol_named("dectris-v2"))
        assert isinstance(source, StoredFrames)
        messages = await sent_messages(source, "dectris-v2")
    items = [cbor2.loads(parts[0]) for parts in messages]
    images = [item for item in items if item["type"] == "image"]
    assert [item["image_id"] for item in images] == list(range(len(COUNTS)))
    for item, chunk in zip(images, chunks_of(tmp_path), strict=True):
        (typed,) = item["data"].values()
        shape, pixels = typed.value
        assert tuple(shape) == DETECTOR
        algorithm, _, payload = pixels.value.value
        assert (algorithm, payload) == (name, chunk)


@pytest.mark.parametrize(("protocol", "filters", "as_stored"), [
    ("native", "bslz4", True), ("native", "lz4", False), ("dectris-v2", "lz4", True), ("dectris-v1", "bslz4", True),
    ("dectris-v2", "gzip", False),
])  # fmt: skip
def test_as_stored_where_the_protocol_allows(tmp_path: Path, protocol: str, filters: str, as_stored: bool) -> None:
    spoken = protocol_named(protocol)
    with open_dataset(write_legacy(tmp_path, filters=FILTERS[filters][0])) as data:
        source = file_source(data, spoken)
        assert isinstance(source, StoredFrames) == as_stored
        if not as_stored:
            with pytest.raises(ConfigurationError, match="choose --encoding"):
                file_source(data, spoken, "as-stored")
        encoder, decoder = spoken.encoder(), spoken.decoder()
        start = source.start(7)
        messages = [*encoder.start(start)]
        for first, packed in source.blocks():
            messages += encoder.frames(7, first, packed, source.encoding)
        found = decoder.feed(ReceivedBatch.from_messages([[bytes(p) for p in m] for m in messages]))
    blocks = [message for message in found if isinstance(message, FrameBlock)]
    (said,) = [message for message in found if isinstance(message, SeriesStart)]
    np.testing.assert_array_equal(unpacked(blocks, said), COUNTS)


def test_an_encoding_of_ones_own_choice(tmp_path: Path) -> None:
    with open_dataset(write_legacy(tmp_path)) as data:
        source = file_source(data, protocol_named("native"), "raw")
        assert source.encoding is Encoding.RAW
        with pytest.raises(ConfigurationError, match="unknown encoding 'zip' for native"):
            file_source(data, protocol_named("native"), "zip")


def test_one_channel_is_sent(tmp_path: Path) -> None:
    with open_dataset(write_2024(tmp_path, TWO)) as data:
        assert file_source(data, protocol_named("dectris-v2")).start(1).channels == ("threshold_1",)
