"""Other people's detector simulators drive ``liveptycho live`` over real sockets. Run with ``make test-peers``.

They live in environments of their own (``.peers``, made by the make target), and run as processes of their own.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import pytest

from tests.data_helpers import SHARED_DATA

pytestmark = pytest.mark.peers

PEERS = Path(__file__).resolve().parents[1] / ".peers"
TICKIT, LIBERTEM = PEERS / "tickit" / "bin", PEERS / "libertem" / "bin"
PATIENCE_S = 120.0

#: Optics that suit any frames: what the simulators send is no picture of anything.
OPTICS = ("--energy-kev", "200", "--semiangle-mrad", "20", "--scan-step-angstrom", "0.4", "--no-viewer")


def require(program: Path) -> str:
    if not program.exists():
        pytest.skip(f"{program.name} is not installed: make test-peers does it")
    return str(program)


@contextmanager
def running(*command: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, cwd=log.parent, start_new_session=True
        )
        try:
            yield process
        finally:
            # With its children: some leave them behind, and the port with them.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


class Live:
    """``liveptycho live``, as a user runs it; its result is in ``result.h5``."""

    def __init__(self, tmp_path: Path, *arguments: str) -> None:
        self.log = tmp_path / "live.log"
        program = [sys.executable, "-c", "from stream.cli import main; main()"]
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                [*program, "live", *arguments, *OPTICS, "-o", str(tmp_path / "result.h5")],
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    def wait_until_connected(self) -> None:
        """A detector sends its header once: to whoever is connected when it is armed."""
        deadline = time.monotonic() + PATIENCE_S
        while "waiting for a series" not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        time.sleep(1.0)

    def finish(self) -> None:
        try:
            self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            pytest.fail(f"live did not end: {self.log.read_text()}")
        assert self.process.returncode == 0, self.log.read_text()


def assert_complete(tmp_path: Path, frames: int) -> None:
    with h5py.File(tmp_path / "result.h5") as file:
        assert file.attrs["frames_received"] == frames
        assert file.attrs["frames_missing"] == 0
        assert file["positions_received"][()].all()
        assert file["mean_pattern"][()].any()


class Rest:
    """The vendor's own program: commands the simulator over REST, with nothing of liveptycho."""

    def __init__(self, port: int) -> None:
        self.base = f"http://127.0.0.1:{port}"
        self.stream = ""

    def __call__(self, path: str, value: Any = None, method: str = "GET") -> Any:
        data = None if method == "GET" else json.dumps({} if value is None else {"value": value}).encode()
        request = urllib.request.Request(
            f"{self.base}/{path}", data=data, method=method, headers={"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            text = reply.read()
        return json.loads(text) if text else None

    def wait(self, path: str = "detector/api/1.8.0/status/state") -> None:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                self(path)
                return
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    def configure(self, **config: Any) -> None:
        for key, value in config.items():
            self(f"detector/api/1.8.0/config/{key}", value, "PUT")

    def command(self, name: str) -> Any:
        return self(f"detector/api/1.8.0/command/{name}", None, "PUT")


# tickit-devices: Diamond's simulated EIGER, REST with both stream versions

TICKIT_YAML = """
- type: tickit_devices.eiger.Eiger
  name: eiger
  inputs: {}
  host: 127.0.0.1
  port: 18081
  stream_host: 127.0.0.1
  stream_legacy_port: 19999
  stream_cbor_port: 13101
"""
STREAM_PORTS = {"dectris-v1": (19999, "legacy"), "dectris-v2": (13101, "cbor")}
#: 16 megapixel frames: a small scan and a small disk, given, keep it short.
SMALL = ("--scan-shape", "3x4", "--bf-centre-px", "2181,2074", "--bf-radius-px", "10", "--threads", "2")


@pytest.fixture
def tickit(tmp_path: Path) -> Iterator[Rest]:
    program = require(TICKIT / "tickit")
    (tmp_path / "eiger.yaml").write_text(TICKIT_YAML)
    with running(program, "all", "eiger.yaml", log=tmp_path / "tickit.log"):
        rest = Rest(18081)
        rest.wait()
        rest.command("initialize")
        yield rest


@pytest.mark.parametrize("protocol", STREAM_PORTS)
@pytest.mark.timeout(300)
def test_tickit_passive(protocol: str, tickit: Rest, tmp_path: Path) -> None:
    port, form = STREAM_PORTS[protocol]
    tickit("stream/api/1.8.0/config/format", form, "PUT")
    tickit("stream/api/1.8.0/config/header_detail", "basic", "PUT")
    tickit.configure(nimages=12, ntrigger=1, trigger_mode="ints", frame_time=0.12, count_time=0.1)
    process = Live(tmp_path, f"tcp://127.0.0.1:{port}", "--protocol", protocol, *SMALL)
    process.wait_until_connected()
    tickit.command("arm")
    tickit.command("trigger")
    process.finish()
    assert_complete(tmp_path, 12)


@pytest.mark.parametrize("protocol", STREAM_PORTS)
@pytest.mark.timeout(300)
def test_tickit_active(protocol: str, tickit: Rest, tmp_path: Path) -> None:
    port, form = STREAM_PORTS[protocol]
    tickit("stream/api/1.8.0/config/format", form, "PUT")
    control = ("--simplon", "http://127.0.0.1:18081", "--trigger", "software", "--frame-time-us", "120000")
    Live(tmp_path, f"tcp://127.0.0.1:{port}", "--protocol", protocol, *control, *SMALL).finish()
    assert_complete(tmp_path, 12)
    assert tickit("detector/api/1.8.0/status/state")["value"] == "idle"


# libertem-live: simulated DECTRIS Stream V1 with REST, and simulated Merlin

DECTRIS_SIM = """
import sys, time
from libertem_live.detectors.dectris.sim import DectrisSim
if __name__ == "__main__":
    sim = DectrisSim(port=18910, zmqport=0, num_mock_frames=16, verbose=False)
    sim.start()
    sim.wait_for_listen()
    print("stream", sim.zmqport, flush=True)
    while True:
        time.sleep(1)
        sim.maybe_raise()
"""


@pytest.fixture
def dectris_sim(tmp_path: Path) -> Iterator[Rest]:
    python = require(LIBERTEM / "python")
    (tmp_path / "dectris_sim.py").write_text(DECTRIS_SIM)
    with running(python, "dectris_sim.py", log=tmp_path / "dectris_sim.log"):
        rest = Rest(18910)
        rest.wait("detector/api/version/")
        told = re.search(r"stream (\d+)", (tmp_path / "dectris_sim.log").read_text())
        assert told is not None
        rest.stream = f"tcp://127.0.0.1:{told[1]}"
        yield rest


LIBERTEM_SCAN = ("--scan-shape", "4x4", "--bf-centre-px", "256,256", "--bf-radius-px", "10")


@pytest.mark.timeout(300)
def test_libertem_passive(dectris_sim: Rest, tmp_path: Path) -> None:
    process = Live(tmp_path, dectris_sim.stream, "--protocol", "dectris-v1", *LIBERTEM_SCAN)
    process.wait_until_connected()
    dectris_sim.command("arm")
    dectris_sim.command("trigger")
    process.finish()
    assert_complete(tmp_path, 16)


@pytest.mark.timeout(300)
def test_libertem_active(dectris_sim: Rest, tmp_path: Path) -> None:
    # Its frames are set to gates, and it does not wait for them.
    control = ("--simplon", "http://127.0.0.1:18910", "--trigger", "gate")
    Live(tmp_path, dectris_sim.stream, "--protocol", "dectris-v1", *control, *LIBERTEM_SCAN).finish()
    assert_complete(tmp_path, 16)


@pytest.fixture
def merlin_header(tmp_path: Path) -> Path:
    archive = SHARED_DATA / "streams" / "merlin_mib" / "Merlin_navigation4x2_ROI.zip"
    if not archive.exists():
        pytest.skip(f"{archive.name} is not there: the recorded streams come with the project's brief")
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(tmp_path)
    return next(tmp_path.rglob("*.hdr"))


@pytest.mark.parametrize("trigger", ["", "software", "line"])
@pytest.mark.timeout(300)
def test_libertem_merlin(trigger: str, merlin_header: Path, tmp_path: Path) -> None:
    program = require(LIBERTEM / "libertem-live-mib-sim")
    ports = ("--data-port", "16342", "--control-port", "16341", "--trigger-port", "16343")
    wait = ("--wait-trigger",) if trigger else ()
    log = tmp_path / "mib_sim.log"
    with running(program, str(merlin_header), *ports, *wait, log=log):
        control = ("--control", "tcp://127.0.0.1:16341", "--trigger", trigger) if trigger else ()
        disk = ("--scan-shape", "2x4", "--bf-centre-px", "64,128", "--bf-radius-px", "10")
        time.sleep(25)  # it compiles before it listens
        process = Live(tmp_path, "tcp://127.0.0.1:16342", "--protocol", "merlin", *control, *disk)
        if trigger == "line":  # it waits for the scan generator, which is the third port
            deadline = time.monotonic() + PATIENCE_S
            while "Waiting for trigger" not in log.read_text():
                assert process.process.poll() is None, process.log.read_text()
                assert time.monotonic() < deadline
                time.sleep(0.1)
            with socket.create_connection(("127.0.0.1", 16343)) as generator:
                generator.sendall(b"TRIGGER\n")
                process.finish()
        process.finish()
    assert_complete(tmp_path, 8)
