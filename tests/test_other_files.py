"""Merlin's .mib, NumPy's .npy, and what RosettaSciIO reads."""

from __future__ import annotations

import importlib.util
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from detectors import codec
from detectors.errors import DataFileError
from detectors.messages import Encoding, FrameBlock, ReceivedBatch, SeriesStart
from detectors.protocols.registry import protocol_named
from stream.config import Layer
from stream.files import Dataset4D, open_dataset
from stream.offline import StoredFrames, file_source, file_start, reconstruct_file
from tests.data_helpers import SHARED_DATA, Case

SCAN, DETECTOR = (6, 7), (16, 24)
COUNTS = np.random.default_rng(3).poisson(2.0, (*SCAN, *DETECTOR)).astype("<u2")
FRAMES = COUNTS.reshape(-1, *DETECTOR)


def decoded(data: Dataset4D, frames_at_once: int = 5) -> np.ndarray:
    max_bytes = frames_at_once * DETECTOR[0] * DETECTOR[1] * data.dtype.itemsize
    return np.concatenate([frames for _, frames in data.blocks(max_bytes)])


def unpacked(data: Dataset4D) -> tuple[np.ndarray, np.ndarray]:
    """(indices, frames) of the packed blocks."""
    blocks = list(data.packed_blocks(max_bytes=5 * DETECTOR[0] * DETECTOR[1] * data.dtype.itemsize))
    frames = [
        codec.decode(b.slab[o : o + n], b.encoding, data.detector_shape, data.dtype)
        for b in blocks
        for o, n in zip(b.offsets, b.sizes, strict=True)
    ]
    return np.concatenate([b.indices for b in blocks]), np.stack(frames)


# ---- .mib ----

HDR = (
    "HDR,\t\r\nTime and Date Stamp (day, mnth, yr, hr, min, s):\t02/07/2024 13:46:43\r\nChip ID:\tW559_G11\r\n"
    "Counter Depth (number):\t12\r\nFrames in Acquisition (Number):\t{frames}\r\n"
    "Frames per Trigger (Number):\t{per_trigger}\r\n{more}End\t"
)


def mib(frames: np.ndarray, numbers: Any = None, header_bytes: int = 384) -> bytes:
    """Frames as Merlin writes them in binary mode."""
    kind = {1: "U08", 2: "U16", 4: "U32"}[frames.itemsize]
    out = b""
    for frame, number in zip(frames, range(1, len(frames) + 1) if numbers is None else numbers, strict=True):
        head = (
            f"MQ1,{number:06d},{header_bytes:05d},01,{frame.shape[1]:04d},{frame.shape[0]:04d},{kind},   1x1,01,"
            "2021-05-07 18:56:59.151103,0.100000,0,0,0,4.000000E+1,5.110000E+2,0,0,0,0,0,0,3RX,"
            "MQ1A,2021-05-07T16:56:59.151103718Z,100000000ns,12,"
        )
        out += head.encode().ljust(header_bytes, b"\0") + frame.astype(frame.dtype.newbyteorder(">")).tobytes()
    return out


@pytest.fixture
def make_mib(tmp_path: Path) -> Callable[..., Path]:
    def make(
        frames: np.ndarray = FRAMES, *, per_trigger: int = 1, more: str = "", hdr: bool = True, **options: Any
    ) -> Path:
        path = tmp_path / "scan.mib"
        path.write_bytes(mib(frames, **options))
        if hdr:
            text = HDR.format(frames=len(frames), per_trigger=per_trigger, more=more).encode("latin-1")
            path.with_suffix(".hdr").write_bytes(text.ljust(2048))
        return path

    return make


@pytest.mark.parametrize("dtype", ["<u1", "<u2", "<u4"])
@pytest.mark.parametrize("suffix", [".mib", ".hdr"])
def test_mib(make_mib: Callable[..., Path], dtype: str, suffix: str) -> None:
    frames = FRAMES.astype(dtype)
    with open_dataset(make_mib(frames).with_suffix(suffix)) as data:
        assert data.layout == "Merlin .mib"
        assert data.frames == len(frames)
        assert data.detector_shape == DETECTOR
        assert data.dtype == np.dtype(dtype)
        assert data.encoding is (Encoding.RAW if dtype == "<u1" else Encoding.RAW_BIG_ENDIAN)
        assert data.settings["detector_number"] == "W559_G11"
        assert not data.notes
        np.testing.assert_array_equal(decoded(data), frames)
        indices, packed = unpacked(data)
        np.testing.assert_array_equal(packed, frames)
        np.testing.assert_array_equal(indices, np.arange(len(frames)))


def test_mib_frames_are_not_copied(make_mib: Callable[..., Path]) -> None:
    with open_dataset(make_mib()) as data:
        for block in data.packed_blocks():
            assert block.slab.base is not None
            assert not block.slab.flags.writeable


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"more": "ScanX:\t7\r\nScanY:\t6\r\n"}, (6, 7)),
        ({"per_trigger": 7}, (6, 7)),
        ({"per_trigger": 42}, None),
        ({"per_trigger": 8}, None),
        ({}, None),
        ({"hdr": False}, None),
    ],
)
def test_mib_scan_shape(make_mib: Callable[..., Path], options: dict[str, Any], shape: tuple[int, int] | None) -> None:
    with open_dataset(make_mib(**options)) as data:
        assert data.scan_shape == shape


def test_mib_cut_short(make_mib: Callable[..., Path]) -> None:
    path = make_mib()
    path.write_bytes(path.read_bytes()[:-100])
    with open_dataset(path) as data:
        assert data.frames == len(FRAMES) - 1
        assert "the last frame is cut short after 1052 of 1152 bytes" in data.notes[0]
        np.testing.assert_array_equal(decoded(data), FRAMES[:-1])


@pytest.mark.parametrize("length", [10, 384, 1000])
def test_mib_without_a_whole_frame(make_mib: Callable[..., Path], length: int) -> None:
    path = make_mib()
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(DataFileError, match=r"scan\.mib"):
        open_dataset(path)


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ([1, 2, 5, 6, 9], [0, 1, 4, 5, 8]),
        ([11, 12, 13, 14, 15], [0, 1, 2, 3, 4]),
        ([1, 2, 1, 2, 1], [0, 1, 2, 3, 4]),
        ([999998, 999999, 1000000, 1000001, 1000002], [0, 1, 2, 3, 4]),
    ],
)
def test_mib_frame_numbers(make_mib: Callable[..., Path], numbers: list[int], expected: list[int]) -> None:
    with open_dataset(make_mib(FRAMES[:5], numbers=numbers)) as data:
        indices, packed = unpacked(data)
        assert indices.tolist() == expected
        np.testing.assert_array_equal(packed, FRAMES[:5])


def test_mib_exposure_times(make_mib: Callable[..., Path]) -> None:
    path = make_mib(FRAMES[:3])
    content = path.read_bytes()
    second = content.index(b"MQ1A,", 1152)
    path.write_bytes(content[:second] + content[second:].replace(b"59.151103718Z", b"59.151203718Z", 1))
    with open_dataset(path) as data:
        (block,) = data.packed_blocks()
        assert (block.exposed_ns - block.exposed_ns[0]).tolist() == [0, 100_000, 0]
    path.write_bytes(content.replace(b"MQ1A,2021-05-07", b"MQ1A,2021-05-99").replace(b",2021-05-07 ", b",2021-05-99 "))
    with open_dataset(path) as data:
        (block,) = data.packed_blocks()
        assert block.exposed_ns is None


def test_mib_with_another_frame_size_in_the_middle(make_mib: Callable[..., Path]) -> None:
    path = make_mib()
    path.write_bytes(mib(FRAMES[:3]) + mib(FRAMES[:4, :8]))
    with open_dataset(path) as data, pytest.raises(DataFileError, match="frame 4 does not begin with a Merlin header"):
        list(data.packed_blocks())


def test_hdr_that_is_none(make_mib: Callable[..., Path]) -> None:
    path = make_mib()
    path.with_suffix(".hdr").write_bytes(b"once upon a time")
    with pytest.raises(DataFileError, match=r"scan\.hdr"):
        open_dataset(path)


def test_hdr_alone(make_mib: Callable[..., Path]) -> None:
    path = make_mib()
    path.unlink()
    with pytest.raises(DataFileError, match=r"scan\.mib: it cannot be read"):
        open_dataset(path.with_suffix(".hdr"))


def test_mib_is_sent_as_it_is(make_mib: Callable[..., Path]) -> None:
    spoken = protocol_named("merlin")
    with open_dataset(make_mib(more="ScanX:\t7\r\nScanY:\t6\r\n")) as data:
        assert data.protocol == "merlin"
        source = file_source(data, spoken)
        assert isinstance(source, StoredFrames)
        encoder, decoder = spoken.encoder(), spoken.decoder()
        messages = [*encoder.start(source.start(1))]
        for first, payloads in source.blocks():
            messages += encoder.frames(1, first, payloads, source.encoding)
        found = decoder.feed(ReceivedBatch.from_messages([[b"".join(map(bytes, m))] for m in messages]))
    (start,) = [message for message in found if isinstance(message, SeriesStart)]
    blocks = [message for message in found if isinstance(message, FrameBlock)]
    assert start.scan_shape == SCAN
    frames = [
        codec.decode(b.slab[o : o + n], b.encoding, DETECTOR, start.dtype)
        for b in blocks
        for o, n in zip(b.offsets, b.sizes, strict=True)
    ]
    np.testing.assert_array_equal(np.stack(frames), FRAMES)


def test_8_bit_mib_is_sent_as_it_is(make_mib: Callable[..., Path]) -> None:
    with open_dataset(make_mib(FRAMES.astype("u1"))) as data:
        source = file_source(data, protocol_named("merlin"))
        assert isinstance(source, StoredFrames)
        assert source.encoding is Encoding.RAW_BIG_ENDIAN


def test_mib_as_another_protocol(make_mib: Callable[..., Path]) -> None:
    with open_dataset(make_mib()) as data:
        source = file_source(data, protocol_named("dectris-v2"))
        assert not isinstance(source, StoredFrames)
        frames = [
            codec.decode(payload, source.encoding, DETECTOR, data.dtype)
            for _, payloads in source.blocks()
            for payload in payloads
        ]
    np.testing.assert_array_equal(np.stack(frames), FRAMES)


def test_reconstruction_of_a_mib(make_mib: Callable[..., Path], tmp_path: Path) -> None:
    case = Case(scan=SCAN, detector=DETECTOR)
    layers = [Layer.of("flag", case.settings)]
    np.save(tmp_path / "scan.npy", case.counts())
    one = reconstruct_file(make_mib(case.counts().reshape(-1, *DETECTOR)), layers)
    other = reconstruct_file(tmp_path / "scan.npy", layers)
    np.testing.assert_allclose(one.object, other.object, rtol=0, atol=3e-7)
    assert np.ptp(one.phase) > 1e-3


REAL = SHARED_DATA / "streams" / "merlin_mib"


def real_files(archive: str, folder: Path) -> list[Path]:
    if not REAL.exists():
        pytest.skip(f"needs the Merlin files in {REAL}")
    with zipfile.ZipFile(REAL / f"{archive}.zip") as file:
        file.extractall(folder)
    return sorted(folder.glob("*.mib"))


@pytest.mark.parametrize(
    ("archive", "count"),
    [("Merlin_Single_Quad", 16), ("Merlin_navigation4x2_ROI", 2), ("Merlin_navigation4x2_signalNx256_ROI", 2)],
)
def test_real_binary_files(archive: str, count: int, tmp_path: Path) -> None:
    api = pytest.importorskip("rsciio.quantumdetector")
    paths = [path for path in real_files(archive, tmp_path) if not path.stem.endswith("RAW")]
    assert len(paths) == count
    for path in paths:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            (theirs,) = api.file_reader(str(path))
        with open_dataset(path) as data:
            # RosettaSciIO turns every frame upside down.
            expected = theirs["data"].reshape(-1, *data.detector_shape)[:, ::-1]
            np.testing.assert_array_equal(np.concatenate([f for _, f in data.blocks()]), expected, err_msg=path.name)
            indices, packed = unpacked(data)
            np.testing.assert_array_equal(packed, expected, err_msg=path.name)
            np.testing.assert_array_equal(indices, np.arange(len(expected)))
            if "signalNx256" in archive:  # of the newer software, which says so
                assert data.scan_shape == (2, 4)


def test_real_raw_files(tmp_path: Path) -> None:
    paths = [path for path in real_files("Merlin_Single_Quad", tmp_path) if path.stem.endswith("RAW")]
    assert len(paths) == 4
    for path in paths:
        with open_dataset(path) as raw, open_dataset(path.with_name(path.name.replace("RAW", ""))) as binary:
            one, other = (np.concatenate([f for _, f in data.blocks()]) for data in (raw, binary))
            assert one.shape == other.shape
            assert (one == other).mean() > 0.99, path.name  # two exposures of the same noise
            np.testing.assert_array_equal(unpacked(raw)[1], one)


# ---- .npy ----


@pytest.mark.parametrize("shape", [COUNTS.shape, FRAMES.shape])
@pytest.mark.parametrize(
    ("stored", "given"),
    [("<u1", "<u1"), ("<u2", "<u2"), (">u2", "<u2"), ("<u4", "<u4"), ("<f4", "<f4"), ("?", "<u1")]
    + [(kind, "<f4") for kind in ("<i2", "<i8", "<u8", "<f8", ">f8", "<f2")],
)
@pytest.mark.parametrize("fortran", [False, True])
def test_npy(tmp_path: Path, shape: tuple[int, ...], stored: str, given: str, fortran: bool) -> None:
    array = COUNTS.reshape(shape).astype(stored)
    np.save(tmp_path / "scan.npy", np.asfortranarray(array) if fortran else array)
    with open_dataset(tmp_path / "scan.npy") as data:
        assert data.scan_shape == (SCAN if len(shape) == 4 else None)
        assert data.dtype == np.dtype(given)
        expected = array.reshape(-1, *DETECTOR).astype(given)
        np.testing.assert_array_equal(decoded(data), expected)
        np.testing.assert_array_equal(unpacked(data)[1], expected)
        assert any("Fortran order" in note for note in data.notes) == fortran


def test_npy_of_another_name(tmp_path: Path) -> None:
    np.save(tmp_path / "scan.npy", COUNTS)
    (tmp_path / "scan.npy").rename(tmp_path / "scan.dat")
    with open_dataset(tmp_path / "scan.dat") as data:
        np.testing.assert_array_equal(decoded(data), FRAMES)


class Trap:
    """What must never be unpickled."""

    def __reduce__(self) -> Any:
        return (pytest.fail, ("unpickled",))


def test_npy_is_never_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "scan.npy", np.array([[[Trap()]]], dtype=object), allow_pickle=True)
    with pytest.raises(DataFileError, match="an array of plain numbers was expected"):
        open_dataset(tmp_path / "scan.npy")


@pytest.mark.parametrize("array", [COUNTS[0, 0], COUNTS[:0], COUNTS[None], COUNTS.astype("c8"), COUNTS.astype("U3")])
def test_npy_that_are_no_frames(tmp_path: Path, array: np.ndarray) -> None:
    np.save(tmp_path / "scan.npy", array)
    with pytest.raises(DataFileError, match=r"scan\.npy"):
        open_dataset(tmp_path / "scan.npy")


def test_npy_beyond_float32(tmp_path: Path) -> None:
    array = COUNTS.astype("f8")
    array[3, 2, 1, 0] = 1e300
    np.save(tmp_path / "scan.npy", array)
    with open_dataset(tmp_path / "scan.npy") as data, pytest.raises(DataFileError, match="beyond float32's range"):
        decoded(data)


@pytest.mark.parametrize("length", [6, 40, 1000])
def test_npy_cut_short(tmp_path: Path, length: int) -> None:
    np.save(tmp_path / "scan.npy", COUNTS)
    content = (tmp_path / "scan.npy").read_bytes()
    (tmp_path / "scan.npy").write_bytes(content[:length])
    with pytest.raises(DataFileError, match=r"scan\.npy"):
        open_dataset(tmp_path / "scan.npy")


# ---- RosettaSciIO ----

needs_rosettasciio = pytest.mark.skipif(
    importlib.util.find_spec("rsciio") is None, reason="needs RosettaSciIO (pip install 'liveptycho[files]')"
)


def write_hspy(path: Path, units: tuple[str, str] = ("nm", "mrad"), tem: dict[str, Any] | None = None) -> Path:
    """``COUNTS`` as HyperSpy stores them; ``units`` of the scan's and of the detector's steps."""
    steps = [(0.05, units[0]), (0.05, units[0]), (1.5, units[1]), (1.25, units[1])]
    with h5py.File(path, "w") as file:
        file.attrs["file_format"], file.attrs["file_format_version"] = "HyperSpy", "3.3"
        group = file.create_group("Experiments/scan")
        group.create_dataset("data", data=COUNTS, chunks=(1, 7, *DETECTOR))
        for number, (size, (scale, unit)) in enumerate(zip(COUNTS.shape, steps, strict=True)):
            group.create_group(f"axis-{number}").attrs.update(
                _type="UniformDataAxis", name="yxvu"[number], size=size, scale=scale, offset=0.0, units=unit,
                navigate=number < 2, is_binned=False,
            )  # fmt: skip
        group.create_group("metadata/General").attrs["title"] = "scan"
        group.create_group("metadata/Signal").attrs["signal_type"] = ""
        group.create_group("metadata/Acquisition_instrument/TEM").attrs.update(tem or {})
        for name in ("original_metadata", "attributes", "learning_results"):
            group.create_group(name)
    return path


@needs_rosettasciio
def test_hspy(tmp_path: Path) -> None:
    path = write_hspy(tmp_path / "scan.hspy", tem={"beam_energy": 200.0, "convergence_angle": 20.0})
    with open_dataset(path) as data:
        assert data.scan_shape == SCAN
        assert data.dtype == np.dtype("<u2")
        np.testing.assert_array_equal(decoded(data), FRAMES)
        np.testing.assert_array_equal(unpacked(data)[1], FRAMES)
        assert data.settings == {
            "energy_kev": 200.0,
            "semiangle_mrad": 20.0,
            "scan_step_angstrom": [0.5, 0.5],
            "detector_pixel_mrad": [1.5, 1.25],
        }


@needs_rosettasciio
@pytest.mark.parametrize(
    ("units", "expected", "note"),
    [
        (("Å", "1/nm"), {"scan_step_angstrom": [0.05] * 2, "detector_pixel_inv_angstrom": [0.15, 0.125]}, None),
        (("µm", "rad"), {"scan_step_angstrom": [500.0] * 2, "detector_pixel_mrad": [1500.0, 1250.0]}, None),
        (("A", "nm^-1"), {"scan_step_angstrom": [0.05] * 2, "detector_pixel_inv_angstrom": [0.15, 0.125]}, None),
        (("<undefined>", "px"), {}, None),
        (("furlong", "mrad"), {"detector_pixel_mrad": [1.5, 1.25]}, "the scan axes have a step of 0.05, 0.05"),
        (("nm", "nm"), {"scan_step_angstrom": [0.5] * 2}, "the detector axes have a step of 1.5, 1.25"),
    ],
)
def test_units(tmp_path: Path, units: tuple[str, str], expected: dict[str, Any], note: str | None) -> None:
    with open_dataset(write_hspy(tmp_path / "scan.hspy", units)) as data:
        assert data.settings == {key: pytest.approx(value) for key, value in expected.items()}
        assert (note in data.notes[0]) if note else not data.notes


def without_rosettasciio(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "rsciio" else real(name, *rest)
    )


@needs_rosettasciio
def test_hspy_without_rosettasciio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_hspy(tmp_path / "scan.hspy")
    without_rosettasciio(monkeypatch)
    with open_dataset(path) as data:
        np.testing.assert_array_equal(decoded(data), FRAMES)
        assert "pip install 'liveptycho[files]'" in data.notes[0]


def test_rosettasciio_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scan.blo").write_bytes(b"something")
    without_rosettasciio(monkeypatch)
    with pytest.raises(DataFileError, match=r"pip install 'liveptycho\[files\]'"):
        open_dataset(tmp_path / "scan.blo")


@needs_rosettasciio
def test_blockfile(tmp_path: Path) -> None:
    pytest.importorskip("skimage", reason="RosettaSciIO writes .blo with scikit-image")
    from rsciio.blockfile import file_writer

    square = COUNTS[:, :, :, :16].astype("u1")
    described = [
        {"name": name, "size": size, "scale": scale, "offset": 0.0, "units": unit, "navigate": scan}
        for name, size, scale, unit, scan in zip(
            "yxvu",
            square.shape,
            (0.05, 0.05, 1.5, 1.5),
            ("nm", "nm", "cm", "cm"),
            (True, True, False, False),
            strict=True,
        )
    ]
    signal = {
        "data": square,
        "axes": described,
        "metadata": {},
        "original_metadata": {},
        "attributes": {"_lazy": False},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file_writer(str(tmp_path / "scan.blo"), signal)
    with open_dataset(tmp_path / "scan.blo") as data:
        assert data.scan_shape == SCAN
        np.testing.assert_array_equal(decoded(data), square.reshape(-1, 16, 16))
        assert data.settings["scan_step_angstrom"] == pytest.approx([0.5, 0.5])


EMPAD = (
    '<?xml version="1.0" ?>'
    '<root version="1.0">'
    '<raw_file filename="scan_x3_y2.raw"/>'
    '<scan_parameters mode="acquire">'
    "<scan_resolution_x>3</scan_resolution_x>"
    "<scan_resolution_y>2</scan_resolution_y>"
    "</scan_parameters>"
    '<timestamp isoformat="2019-06-07T10:39:29-04:00">1559918369.0</timestamp>'
    "<iom_measurements>"
    "<optics.get_full_scan_field_of_view>(3e-9, 2e-9)</optics.get_full_scan_field_of_view>"
    "<calibrated_pixelsize>1e-2</calibrated_pixelsize>"
    "<high_voltage>200000</high_voltage>"
    "</iom_measurements>"
    "</root>"
)


@needs_rosettasciio
@pytest.mark.parametrize("name", ["scan.xml", "scan_x3_y2.raw"])
def test_empad(tmp_path: Path, name: str) -> None:
    frames = np.random.default_rng(5).normal(size=(6, 130, 128)).astype("<f4")
    (tmp_path / "scan_x3_y2.raw").write_bytes(frames.tobytes())
    (tmp_path / "scan.xml").write_text(EMPAD)
    with open_dataset(tmp_path / name) as data:
        assert data.scan_shape == (2, 3)
        assert data.detector_shape == (128, 128)
        np.testing.assert_array_equal(decoded(data), frames[:, :128])


def test_raw_file_without_description(tmp_path: Path) -> None:
    (tmp_path / "scan.raw").write_bytes(bytes(1000))
    with pytest.raises(DataFileError, match=r"EMPAD's \.xml, of which 0 lie beside it"):
        open_dataset(tmp_path / "scan.raw")


@needs_rosettasciio
@pytest.mark.parametrize("suffix", [".blo", ".xml", ".tvips", ".dm4", ".tif"])
@pytest.mark.parametrize("content", [b"once upon a time", bytes(5000), b"\xff" * 5000])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # its .blo reader leaves the file open
def test_files_that_rosettasciio_cannot_read(tmp_path: Path, suffix: str, content: bytes) -> None:
    (tmp_path / f"scan{suffix}").write_bytes(content)
    with pytest.raises(DataFileError, match=f"scan\\{suffix}: "):
        open_dataset(tmp_path / f"scan{suffix}")


def test_an_unknown_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "scan.doc").write_bytes(b"once upon a time")
    with pytest.raises(DataFileError, match=r"this kind of file is not known; HDF5, \.npy, \.mib and"):
        open_dataset(tmp_path / "scan.doc")


def test_the_same_frames_through_every_reader(tmp_path: Path, make_mib: Callable[..., Path]) -> None:
    np.save(tmp_path / "scan.npy", COUNTS)
    paths = [make_mib(), tmp_path / "scan.npy"]
    if importlib.util.find_spec("rsciio") is not None:
        paths.append(write_hspy(tmp_path / "scan.hspy"))
    for path in paths:
        with open_dataset(path) as data:
            np.testing.assert_array_equal(decoded(data), FRAMES)
            np.testing.assert_array_equal(unpacked(data)[1], FRAMES)
            assert file_start(data).detector_shape == DETECTOR
