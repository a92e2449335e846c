"""The tutorial runs as it is printed: every excerpt is in its script, and its pictures and numbers come out right."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import stream
from detectors.simulator.simulation import SimulatedScan
from stream.spectra import spectrum_at

DOCS = Path(__file__).resolve().parents[1] / "docs"
TEXT = (DOCS / "tutorial.md").read_text(encoding="utf-8")
PICTURES = re.findall(r"\]\(images/(tutorial_\w+\.png)\)", TEXT)


def unindented(text: str) -> str:
    return "\n".join(line.strip() for line in text.splitlines())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The script's pictures and what it printed."""
    pytest.importorskip("matplotlib", reason="the tutorial's pictures need matplotlib: liveptycho[tutorial]")
    output = tmp_path_factory.mktemp("tutorial")
    done = subprocess.run(
        [sys.executable, str(DOCS / "tutorial.py"), "--output", str(output)],
        env={**os.environ, "MPLCONFIGDIR": str(output / "matplotlib")},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    return output, done.stdout


@pytest.fixture(scope="module")
def tutorial() -> ModuleType:
    """The script as a module; nothing in it runs on import."""
    pytest.importorskip("matplotlib", reason="the tutorial's pictures need matplotlib: liveptycho[tutorial]")
    spec = importlib.util.spec_from_file_location("liveptycho_tutorial", DOCS / "tutorial.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_excerpt_is_in_the_script() -> None:
    script = unindented((DOCS / "tutorial.py").read_text(encoding="utf-8"))
    excerpts = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    assert len(excerpts) >= 8
    for excerpt in excerpts:
        assert unindented(excerpt) in script, f"not in tutorial.py:\n{excerpt}"


def test_every_picture_is_made_and_shipped(run: tuple[Path, str]) -> None:
    output, _ = run
    assert len(PICTURES) == 8
    assert sorted(path.name for path in output.glob("*.png")) == sorted(PICTURES)
    for folder in (output, DOCS / "images"):
        for name in PICTURES:
            content = (folder / name).read_bytes()
            assert content.startswith(b"\x89PNG")
            assert 5_000 < len(content) < 250_000, f"{name}: {len(content)} bytes"


def test_the_images_are_right(run: tuple[Path, str]) -> None:
    printed = run[1]
    correlations = dict(re.findall(r"^correlation with the expected phase, (.*): ([\d.]+)$", printed, re.MULTILINE))
    assert correlations.keys() == {"one sideband", "both sidebands", "streamed"}
    assert all(float(value) > 0.95 for value in correlations.values()), printed
    between = re.search(r"^phase between the trotters of q bin \(2, 0\): ([\d.]+) rad$", printed, re.MULTILINE)
    assert between is not None
    assert float(between[1]) == pytest.approx(np.pi, abs=0.1)


def test_streamed_equals_offline_and_the_book(run: tuple[Path, str]) -> None:
    differences = dict(re.findall(r"^streamed against (.*), relative difference: (\S+)$", run[1], re.MULTILINE))
    assert differences.keys() == {"offline", "the book"}
    assert all(float(value) < 1e-5 for value in differences.values()), run[1]


def test_the_text_quotes_what_is_printed(run: tuple[Path, str]) -> None:
    """Up to the noise, which another FFT library may draw differently."""
    for line in run[1].splitlines():
        label, _, number = line.partition(": ")
        quoted = re.search(rf"^    {re.escape(label)}: (\S+)", TEXT, re.MULTILINE)
        assert quoted is not None, label
        assert float(number.split()[0]) == pytest.approx(float(quoted[1]), rel=0.03, abs=1e-5)


def test_the_kernels_of_the_text_are_those_of_the_engine(tutorial: ModuleType) -> None:
    for aberrations in ({}, {"C10": -100.0, "C12": 30.0, "phi12": 20.0}):
        probe = stream.Probe(200e3, 20e-3, aberrations=stream.Aberrations.from_user(aberrations))
        grid = np.meshgrid(*[np.linspace(-1.1, 1.1, 45) * probe.semiangle / probe.wavelength] * 2, indexing="ij")
        for q in ((0.3, -0.1), (-0.9, 0.4), (1.2, 0.9)):
            for name, kernel in (("ssb", tutorial.both_sidebands), ("ssb-single", tutorial.one_sideband)):
                weights = stream.METHODS[name].weights(probe, grid, q)
                np.testing.assert_allclose(kernel(probe, grid, q), weights, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_spectrum_at_is_one_bin_of_the_transform(dtype: type) -> None:
    data = np.random.default_rng(3).integers(0, 200, (6, 9, 4, 5)).astype(dtype)
    spectra = np.fft.fft2(data.astype(np.float64), axes=(0, 1))
    for row, column in ((0, 0), (2, 3), (-1, 4), (5, -8), (3, 0)):
        np.testing.assert_allclose(spectrum_at(data, row, column), spectra[row, column], rtol=1e-12, atol=1e-9)
    np.testing.assert_allclose(spectrum_at(data[..., 0, 0], 1, 2), spectra[1, 2, 0, 0], rtol=1e-12)


def test_pi_lies_between_the_trotters_and_the_triple_overlap_is_dark() -> None:
    """Noise-free counts: the sums of G over the two double overlaps are opposite, wherever the frame's axes lie."""
    cell = (3.905 / 24, 3.905 / 24)
    scan = SimulatedScan((24, 24), cell, rotation_deg=-15.0, detector_shape=(64, 64), electrons_per_frame=None)
    frames = np.concatenate([block for _, block in scan.frames()]).reshape(24, 24, 64, 64)
    geometry = stream.DetectorGeometry(
        (64, 64), scan.detector_pixel_mrad, scan.centre_px, 20.0, np.ones((64, 64), bool)
    )
    k = tuple(angle / scan.probe.wavelength for angle in geometry.angles)
    for row, column in ((2, 0), (0, 2), (1, 1), (1, -1)):
        q_row, q_column = scan.probe.axes.to_detector(row / 3.905, column / 3.905)
        spectrum = spectrum_at(frames, row, column)
        plus, minus = (stream.overlap_masks(scan.probe, k, (s * q_row, s * q_column)) for s in (1, -1))
        one, other = spectrum[plus.double].mean(), spectrum[minus.double].mean()
        assert abs(np.angle(-one / other)) < 0.1
        assert abs(one) == pytest.approx(abs(other), rel=0.1)
        assert np.median(np.abs(spectrum[plus.triple])) < 0.1 * abs(one)
