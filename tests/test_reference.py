"""The three data sets of the project's brief, against the float64 answers that came with them."""

from __future__ import annotations

from pathlib import Path

import h5py
import hdf5plugin
import numpy as np
import pytest

import stream
from tests import oracle
from tests.data_helpers import OWN_DATA, SHARED_DATA

NAMES = ("sto_32x32x96x96", "sto_defocus_64x64x128x128", "particle_128x128x128x128")


def reference_file(name: str) -> Path:
    """The smallest set travels with the repository, the others lie beside it."""
    for folder in (OWN_DATA, SHARED_DATA):
        if (folder / f"{name}.h5").exists():
            return folder / f"{name}.h5"
    pytest.skip(f"{name}.h5 is not here; it is looked for in {SHARED_DATA}")


@pytest.mark.parametrize(("method", "answer"), [("ssb", "np64_ssb_true"), ("ssb-single", "np64_manual")])
@pytest.mark.parametrize("name", NAMES)
def test_answers_of_the_reference_data(name: str, method: str, answer: str) -> None:
    data, answers = reference_file(name), reference_file(f"ref_{name}")
    assert hdf5plugin is not None  # its import registers the filters that the files are packed with
    with h5py.File(answers) as file:
        expected = file[answer][()]
    if method == "ssb":  # stored after py4DSTEM's flip of the amplitude
        expected = (2 - abs(expected)) * np.exp(1j * np.angle(expected))
    result = stream.reconstruct(data, method=method, device="cpu")
    assert oracle.relative_error(result.object, expected) < 1e-5
    assert np.abs(result.phase - np.angle(expected)).max() < 1e-4
    assert result.counters.as_dict() == {
        "received": expected.size,
        "missing": 0,
        "duplicate": 0,
        "late": 0,
        "undecodable": 0,
        "outside": 0,
        "unclaimed": 0,
    }
    assert result.passes == 1
    assert result.positions_received.all()


@pytest.mark.parametrize("name", NAMES[:2])
def test_phase_against_the_specimen(name: str) -> None:
    """Not the numbers of another implementation, but the specimen itself, as SSB passes it on."""
    data = reference_file(name)
    with h5py.File(data) as file:
        truth = file["expected_ssb_phase"][()]
    phase = stream.reconstruct(data, device="cpu").phase
    slope = float(((phase - phase.mean()) * (truth - truth.mean())).sum() / ((truth - truth.mean()) ** 2).sum())
    assert 0.85 < slope < 1.1
    assert np.corrcoef(phase.ravel(), truth.ravel())[0, 1] > 0.85
