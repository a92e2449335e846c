"""The command line as a user meets it: help, one line for each mistake, whole runs of several processes, Ctrl-C."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import zmq

from detectors.messages import Encoding, FrameBlock
from stream.recording import Recorder, open_recording
from tests.live_helpers import SCAN, all_frames, assert_same_object, scan_file

PATIENCE_S = 60.0
COMMANDS = ("demo", "simulate", "live", "record", "replay", "reconstruct", "view", "info", "check")

#: One interpreter start costs a second: nothing of it is thread count or colour.
_ENVIRONMENT = {
    **{key: value for key, value in os.environ.items() if key not in ("DISPLAY", "WAYLAND_DISPLAY")},
    "NO_COLOR": "1",
    "COLUMNS": "300",
    "TERM": "dumb",
}
_START = [sys.executable, "-c", "import sys; sys.argv[0] = 'liveptycho'; from stream.cli import main; main()"]

#: Many short runs: everything is imported once, then every command is a process of its own, forked, with its own exit.
_MANY = """
import json, os, signal, sys
from stream.cli import main
for number, arguments in enumerate(json.load(sys.stdin)):
    child = os.fork()
    if child == 0:
        for descriptor in (1, 2):
            os.dup2(os.open(f"{number}.{descriptor}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        signal.alarm(SECONDS)
        sys.argv = ["liveptycho", *arguments]
        main()
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

#: ``simulate`` as small as the scan of the other tests, but sent by a process of its own.
SIMULATE = (
    *(
        "simulate",
        "--scan",
        "16x16",
        "--detector",
        "32x32",
        "--detector-pixel-mrad",
        "2",
        "--scan-step-angstrom",
        "0.4",
    ),
    *("--dose", "2000", "--specimen", "particle", "--rotation-deg", "20", "--aberrations", "C10=-40"),
)


class Command:
    """A ``liveptycho`` process."""

    def __init__(self, *arguments: object, cwd: Path) -> None:
        self.process = subprocess.Popen(
            [*_START, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd,
            env={**_ENVIRONMENT, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )  # fmt: skip
        self.out = ""

    def said(self, pattern: str) -> str:
        """The line of stdout that matches, read up to there."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.out += line
            if re.search(pattern, line):
                return line
        raise AssertionError(f"{pattern!r} was not said, but {self.out!r} and {self.process.stderr.read()!r}")  # type: ignore[union-attr]

    def end(self) -> tuple[int, str, str]:
        """Wait for the end: exit code, stdout, stderr."""
        out, err = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, self.out + out, err

    def ended_well(self) -> str:
        code, out, err = self.end()
        assert code == 0, (code, out, err)
        assert "Traceback" not in err
        return out


Run = Callable[..., Command]
Outcome = tuple[int, str, str]


def run_many(commands: Sequence[Sequence[object]], cwd: Path, seconds: int = 20) -> list[Outcome]:
    """Exit code, stdout and stderr of each command, one after the other; SIGALRM ends those that take too long."""
    done = subprocess.run(
        [sys.executable, "-c", _MANY.replace("SECONDS", str(seconds))],
        input=json.dumps([[str(argument) for argument in command] for command in commands]),
        stdout=subprocess.PIPE, text=True, cwd=cwd, check=True, timeout=100,
        env={**_ENVIRONMENT, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip
    codes = [int(line) for line in done.stdout.split()]
    assert len(codes) == len(commands)
    return [
        (code, (cwd / f"{number}.1").read_text(), (cwd / f"{number}.2").read_text())
        for number, code in enumerate(codes)
    ]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """Start commands in a folder of their own; none outlives the test."""
    with contextlib.ExitStack() as stack:

        def start(*arguments: object) -> Command:
            command = Command(*arguments, cwd=tmp_path)

            def kill() -> None:
                if command.process.poll() is None:
                    command.process.kill()
                command.process.communicate()

            stack.callback(kill)
            return command

        yield start


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scan_file(tmp_path_factory.mktemp("scan") / "scan.h5")


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scan whose file says nothing of the microscope."""
    path = tmp_path_factory.mktemp("bare") / "bare.h5"
    with h5py.File(path, "w") as file:
        file["entry/frames"] = np.zeros((2, 3, 8, 8), np.uint8)
        file["entry/other"] = np.zeros((2, 3, 8, 8), np.uint8)
    return path


def endpoint_of(command: Command) -> str:
    """Where a sender waits for its receiver."""
    found = re.search(r"tcp://[\d.]+:\d+", command.said("sending on"))
    assert found is not None
    return found[0]


# help


@pytest.fixture(scope="module")
def helps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What ``--help`` says, by command."""
    outcomes = run_many([("--help",), *((name, "--help") for name in COMMANDS)], tmp_path_factory.mktemp("helps"))
    assert [code for code, _, _ in outcomes] == [0] * (1 + len(COMMANDS))
    assert "".join(err for _, _, err in outcomes) == ""
    return dict(zip(("", *COMMANDS), (out for _, out, _ in outcomes), strict=True))


def test_help_names_the_commands_and_their_options(helps: dict[str, str]) -> None:
    for name in COMMANDS:
        assert name in helps[""]
    for name, flags in {
        "simulate": "--bind --protocol --scan --rate --passes",
        "live": "--protocol --config --record --output --passes --no-viewer --publish --device --bind --follow",
        "record": "--protocol",
        "replay": "--bind --speed",
        "reconstruct": "--output --config --method --device --dataset",
        "check": "--protocol",
        "demo": "--headless --output",
    }.items():
        for flag in flags.split():
            assert flag in helps[name], (name, flag)


@pytest.mark.parametrize("name", ["live", "reconstruct", "info", "simulate"])
def test_help_has_units(name: str, helps: dict[str, str]) -> None:
    lines = helps[name].splitlines()
    for flag, unit in (
        ("--energy-kev", "[keV]"), ("--semiangle-mrad", "[mrad]"), ("--scan-step-angstrom", "[Å]"),
        ("--detector-pixel-mrad", "[mrad]"), ("--rotation-deg", "[degrees]"), ("--aberrations", "[Å, degrees]"),
    ):  # fmt: skip
        at = next(i for i, line in enumerate(lines) if flag in line)
        assert unit in re.sub(r"[│\s]+", " ", " ".join(lines[at : at + 3])), (name, flag)


@pytest.mark.parametrize("name", ["live", "reconstruct", "info"])
def test_help_tells_image_channels_from_thresholds(name: str, helps: dict[str, str]) -> None:
    text = re.sub(r"[│\s]+", " ", helps[name])
    threshold, images = re.findall(r" --channels? \S+ (.*?)(?= --[a-z]+)", text)
    assert "threshold to reconstruct" in threshold
    assert "Which images are made" in images
    assert "phase, bf, df, com, pattern" in images
    assert "Which images are made: see --channels." in text
    assert "Which threshold of the detector is taken: see --channel." in text


# mistakes: one line on stderr, no traceback, a code that is not 0

MISTAKES: dict[str, tuple[tuple[object, ...], str]] = {
    "missing file": (("reconstruct", "nothing.h5", "-o", "r.h5"), "nothing.h5: no such file"),
    "corrupt file": (("reconstruct", "corrupt.h5", "-o", "r.h5"), "corrupt.h5: "),
    "no HDF5": (("reconstruct", "text.h5", "-o", "r.h5"), "an HDF5 file was expected"),
    "wrong dataset": (("reconstruct", "{scan}", "-o", "r.h5", "--dataset", "nope"), "has no dataset 'nope'"),
    "several datasets": (("reconstruct", "{bare}", "-o", "r.h5"), "choose one with --dataset"),
    "missing keys": (
        ("reconstruct", "{bare}", "--dataset", "entry/frames", "-o", "r.h5"),
        "missing: energy_kev, scan_step_angstrom, semiangle_mrad.*--energy-kev --scan-step-angstrom",
    ),
    "energy nan": (("reconstruct", "{scan}", "-o", "r.h5", "--energy-kev", "nan"), "energy_kev"),
    "energy negative": (("reconstruct", "{scan}", "-o", "r.h5", "--energy-kev", "-5"), "energy_kev"),
    "unknown method": (("reconstruct", "{scan}", "-o", "r.h5", "--method", "magic"), "known are ssb, ssb-single"),
    "scan shape": (("reconstruct", "{scan}", "-o", "r.h5", "--scan-shape", "16"), "written ROWSxCOLUMNS"),
    "aberrations": (("reconstruct", "{scan}", "-o", "r.h5", "--aberrations", "C10"), "written C10=-100"),
    "unknown aberration": (("reconstruct", "{scan}", "-o", "r.h5", "--aberrations", "Q1=3"), "unknown aberration"),
    "output below a file": (("reconstruct", "{scan}", "-o", "text.h5/r.h5"), "cannot write"),
    "output not allowed": (("reconstruct", "{scan}", "-o", "/proc/nothing/r.h5"), "cannot write"),
    "output is a folder": (("reconstruct", "{scan}", "-o", "/tmp"), "cannot write"),
    "result over input": (("reconstruct", "{scan}", "-o", "{scan}"), "would overwrite its own source"),
    "passes": (("reconstruct", "{scan}", "-o", "r.h5", "--passes", "-3"), "--passes must be at least 1"),
    "image channels": (
        ("reconstruct", "{scan}", "-o", "r.h5", "--channels", "phase,haadf"), "one or more of phase, bf, df,",
    ),
    "live, image channels": (("live", "{taken}", "--no-viewer", "--channels", "bf,bf"), "each once"),
    "device": (("reconstruct", "{scan}", "-o", "r.h5", "--device", "abacus"), "unknown device 'abacus'"),
    "unknown TOML key": (("reconstruct", "{scan}", "-o", "r.h5", "--config", "key.toml"), "unknown key 'energie_kev'"),
    "no TOML": (("reconstruct", "{scan}", "-o", "r.h5", "--config", "text.h5"), "is not a TOML file"),
    "missing TOML": (("reconstruct", "{scan}", "-o", "r.h5", "--config", "no.toml"), "cannot read the configuration"),
    "missing mask": (("reconstruct", "{scan}", "-o", "r.h5", "--pixel-mask", "no.npy"), "cannot read the pixel mask"),
    "dataset of a recording": (
        ("reconstruct", "{recording}", "-o", "r.h5", "--dataset", "frames"), "leave --dataset out",
    ),
    "truncated recording": (("reconstruct", "truncated.h5", "-o", "r.h5"), "truncated.h5: "),
    "info of nothing": (("info", "nothing.h5"), "no such file"),
    "replay of a text": (("replay", "text.h5", "--bind", "tcp://127.0.0.1:*"), "an HDF5 file was expected"),
    "replay, as another": (
        ("replay", "{recording}", "--bind", "tcp://127.0.0.1:*", "--protocol", "native"), "leave --protocol",
    ),
    "replay speed": (("replay", "{recording}", "--bind", "tcp://127.0.0.1:*", "--speed", "0"), "--speed is a positive"),
    "replay port in use": (("replay", "{recording}", "--bind", "{taken}"), "port is in use by another program"),
    "live, bad address": (("live", "nonsense", "--no-viewer"), "not an address"),
    "live, unknown protocol": (("live", "{taken}", "--no-viewer", "--protocol", "morse"), "unknown protocol 'morse'"),
    "live, port in use": (("live", "{taken}", "--bind", "--no-viewer"), "port is in use"),
    "live, nobody": (("live", "tcp://127.0.0.1:1", "--no-viewer", "--timeout", "0.5"), "nothing came from"),
    "live, publishing": (("live", "{taken}", "--no-viewer", "--publish", "{taken}"), "cannot publish on"),
    "live, passes": (("live", "{taken}", "--no-viewer", "--passes", "-2"), "--passes must be at least 1"),
    "record, existing": (("record", "{taken}", "{scan}"), "recordings are never overwritten"),
    "record, nobody": (("record", "tcp://127.0.0.1:1", "r.h5", "--timeout", "0.5"), "nothing came from"),
    "simulate, port in use": ((*SIMULATE, "--bind", "{taken}"), "port is in use by another program"),
    "simulate, bad address": ((*SIMULATE, "--bind", "nonsense"), "not an address"),
    "simulate, rate": ((*SIMULATE, "--bind", "tcp://127.0.0.1:*", "--rate", "0"), "--rate is a positive number"),
    "simulate, share": ((*SIMULATE, "--bind", "tcp://127.0.0.1:*", "--drop", "1.5"), "must be 0 to 1"),
    "simulate, specimen": ((*SIMULATE, "--bind", "tcp://127.0.0.1:*", "--specimen", "cat"), "unknown specimen 'cat'"),
    "simulate, encoding": ((*SIMULATE, "--bind", "tcp://127.0.0.1:*", "--encoding", "zip"), "unknown encoding 'zip'"),
    "simulate, dtype": ((*SIMULATE, "--bind", "tcp://127.0.0.1:*", "--dtype", "int8"), "dtype must be one of"),
    "simulate, missing file": (("simulate", "nothing.h5", "--bind", "tcp://127.0.0.1:*"), "no such file"),
    "check, unknown protocol": (("check", "{taken}", "--protocol", "morse"), "unknown protocol 'morse'"),
}  # fmt: skip


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory: pytest.TempPathFactory, scan: Path, bare: Path) -> dict[str, Outcome]:
    """Every mistake, made."""
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "text.h5").write_text("once upon a time")
    (folder / "key.toml").write_text("energie_kev = 200\n")
    (folder / "corrupt.h5").write_bytes(scan.read_bytes()[:3000])
    recording = _recording(folder / "recording.h5")
    (folder / "truncated.h5").write_bytes(recording.read_bytes()[: recording.stat().st_size // 2])
    context = zmq.Context()
    try:
        socket = context.socket(zmq.PUSH)
        socket.bind("tcp://127.0.0.1:*")
        taken = socket.getsockopt_string(zmq.LAST_ENDPOINT)
        names = {"scan": scan, "bare": bare, "recording": recording, "taken": taken}
        commands = [[str(argument).format(**names) for argument in arguments] for arguments, _ in MISTAKES.values()]
        return dict(zip(MISTAKES, run_many(commands, folder), strict=True))
    finally:
        context.destroy(linger=0)


def _recording(path: Path) -> Path:
    frames = all_frames()
    size = frames[0].nbytes
    block = FrameBlock(
        1, Encoding.RAW, np.arange(len(frames)), np.arange(len(frames)) * size, np.full(len(frames), size),
        frames.reshape(-1).view(np.uint8),
    )  # fmt: skip
    with Recorder(path, SCAN.start(1), "native", "0") as recorder:
        recorder.write(block)
    return path


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name: str, mistakes: dict[str, Outcome]) -> None:
    code, _, err = mistakes[name]
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("liveptycho: ")
    assert re.search(MISTAKES[name][1], lines[0]), lines[0]
    assert "internal error" not in err
    assert code == 1


RARER = {
    "output without a name": ("reconstruct", "{scan}", "-o", "."),
    "negative seed": (*SIMULATE, "--bind", "tcp://127.0.0.1:*", "--seed", "-1"),
    "series beyond 64 bits": (*SIMULATE, "--bind", "tcp://127.0.0.1:*", "--series", "99999999999999999999"),
    "publishing on half an address": ("live", "tcp://127.0.0.1:1", "--no-viewer", "--publish", "tcp://[::1"),
    "checking half an address": ("check", "tcp://[::1"),
    "checking a name that is none": ("check", "tcp://a..b:31000"),
}


@pytest.fixture(scope="module")
def rarer_mistakes(tmp_path_factory: pytest.TempPathFactory, scan: Path) -> dict[str, Outcome]:
    """Rarer mistakes, made."""
    folder = tmp_path_factory.mktemp("rarer")
    (folder / "text.h5").write_text("once upon a time")
    commands = [[argument.format(scan=scan) for argument in arguments] for arguments in RARER.values()]
    return dict(zip(RARER, run_many(commands, folder, seconds=4), strict=True))


@pytest.mark.parametrize("name", RARER)
def test_a_rarer_mistake_is_told(name: str, rarer_mistakes: dict[str, Outcome]) -> None:
    code, out, err = rarer_mistakes[name]
    assert "internal error" not in err
    assert code in (1, 2), out + err  # 2: a wrong option, told with the way to --help
    assert "Traceback" not in out + err
    assert ("Usage:" in err) == (code == 2)


def test_a_wrong_option_is_told_with_the_way_to_help(run: Run) -> None:
    code, _, err = run("reconstruct", "--enegry-kev", "200").end()
    assert code == 2
    assert "Traceback" not in err
    assert "-h" in err


def test_debug_shows_where(run: Run) -> None:
    code, _, err = run("--debug", "info", "nothing.h5").end()
    assert code == 1
    assert "Traceback" in err


# whole runs


def test_simulate_to_live_record_and_back(run: Run, tmp_path: Path) -> None:
    sender = run(*SIMULATE, "--bind", "tcp://127.0.0.1:*")
    address = endpoint_of(sender)
    live = run("live", address, "--no-viewer", "--output", "r.h5", "--record", "rec.h5", "--device", "cpu")
    out = live.ended_well()
    assert "frames received 256" in out
    assert "MB at most" in out, "the memory bound is printed"
    assert "256 frames" in sender.ended_well()

    for arguments in (("reconstruct", "rec.h5", "--output", "again.h5"), ("info", "rec.h5"), ("info", "r.h5")):
        assert run(*arguments).ended_well()
    with h5py.File(tmp_path / "r.h5") as one, h5py.File(tmp_path / "again.h5") as other:
        assert_same_object(other["object"][()], one["object"][()])
        configuration = str(one.attrs["configuration"])
        assert one.attrs["frames_received"] == 256

    (tmp_path / "same.toml").write_text(configuration)
    replay = run("replay", "rec.h5", "--bind", "tcp://127.0.0.1:*", "--speed", "max")
    address = endpoint_of(replay)
    recorder = run("record", address, "rec-2.h5")
    assert "256 frames recorded" in recorder.ended_well()
    assert "256 frames delivered" in replay.ended_well()
    with open_recording(tmp_path / "rec.h5") as one, open_recording(tmp_path / "rec-2.h5") as other:
        assert other.frames == one.frames
        assert other.start.header == one.start.header

    run("reconstruct", "rec-2.h5", "--output", "third.h5", "--config", "same.toml").ended_well()
    with h5py.File(tmp_path / "r.h5") as one, h5py.File(tmp_path / "third.h5") as other:
        assert_same_object(other["object"][()], one["object"][()])


def test_live_says_what_is_left_out_and_so_does_its_result(run: Run, tmp_path: Path) -> None:
    sender = run(*SIMULATE, "--bind", "tcp://127.0.0.1:*")
    flags = ("--no-viewer", "--output", "r.h5", "--device", "cpu", "--channels", "phase,bf")
    out = run("live", endpoint_of(sender), *flags).ended_well()
    sentence = "left out: df, com, pattern (--channels phase,bf)"
    assert sentence in out[: out.index("frames received")], "said at the start"
    assert "phase" in out
    assert sentence in run("info", "r.h5").ended_well()
    with h5py.File(tmp_path / "r.h5") as file:
        assert {"phase", "object"} <= file.keys()
        assert list(file["virtual"]) == ["bright_field"]
        assert not {"com", "mean_pattern"} & file.keys()


def test_reconstruct_without_the_phase(run: Run, scan: Path, tmp_path: Path) -> None:
    out = run("reconstruct", scan, "-o", "r.h5", "--channels", "df,pattern", "--device", "cpu").ended_well()
    assert "16x16 positions, images: dark_field, mean_pattern" in out
    assert "left out: phase, bf, com (--channels df,pattern)" in out
    with h5py.File(tmp_path / "r.h5") as file:
        assert file["reconstruction"].attrs["default"] == "dark_field"


def test_a_file_is_simulated_and_checked(run: Run, scan: Path) -> None:
    sender = run("simulate", scan, "--bind", "tcp://127.0.0.1:*", "--encoding", "lz4")
    address = endpoint_of(sender)
    out = run("check", address).ended_well()
    assert out.count("OK") >= 6
    assert "scan 16x16" in out
    sender.ended_well()


def test_info_says_where_each_value_comes_from(run: Run, scan: Path, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("rotation_deg = 7.0\n")
    out = run("info", scan, "--config", "c.toml", "--energy-kev", "80").ended_well()
    rows = {cells[0]: cells[1:] for line in out.splitlines() if len(cells := line.strip("│ ").split("│")) > 2}
    rows = {key.strip(): [cell.strip() for cell in cells] for key, cells in rows.items()}
    assert rows["energy_kev"] == ["80.0", "flag"]
    assert rows["rotation_deg"] == ["7.0", "config file c.toml"]
    assert rows["semiangle_mrad"][1] == "file"
    assert "measured in the first" in rows["bf_centre_px"][1]
    assert rows["method"] == ["ssb", "default"]


def test_check_without_anybody(run: Run) -> None:
    code, out, err = run("check", "tcp://127.0.0.1:1").end()
    assert code == 1
    assert "nobody listens" in out
    assert err == ""


@pytest.mark.parametrize("when", ["waiting", "scanning"])
def test_ctrl_c_ends_live_soon_and_saves_what_came(when: str, run: Run, tmp_path: Path) -> None:
    # Endless and slow, with the disk known: there is something to save after the first rows.
    sender = run(
        *SIMULATE, "--bind", "tcp://127.0.0.1:*", "--passes", "0", "--rate", "400", "--frames-per-message", "4"
    )
    address = endpoint_of(sender) if when == "scanning" else "tcp://127.0.0.1:1"
    live = run(
        *("live", address, "--no-viewer", "--output", "r.h5", "--record", "rec.h5", "--passes", "0"),
        *("--bf-centre-px", "15.5,15.5", "--device", "cpu"),
    )
    live.said("MB at most" if when == "scanning" else "waiting for a series")
    if when == "scanning":
        _until(lambda: (tmp_path / "rec.h5").exists())
    began = time.monotonic()
    live.process.send_signal(signal.SIGINT)
    code, out, err = live.end()
    assert time.monotonic() - began < 2.0
    assert "Traceback" not in out + err
    if when == "scanning":
        assert "stopped by the user" in err
        assert code in (0, 1, 130)
        with h5py.File(tmp_path / "r.h5") as file:
            assert file["object"].shape == (16, 16)
        with open_recording(tmp_path / "rec.h5") as recording:
            assert not recording.complete
    else:
        assert code in (0, 1, 130)
        assert not (tmp_path / "r.h5").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        (*SIMULATE, "--bind", "tcp://127.0.0.1:*"),
        ("record", "tcp://127.0.0.1:1", "r.h5"),
        ("check", "{silent}", "--timeout", "30"),
    ],
)
def test_ctrl_c_ends_other_commands_soon(arguments: tuple[str, ...], run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        silent = f"tcp://127.0.0.1:{listening.getsockname()[1]}"
        command = run(*(argument.format(silent=silent) for argument in arguments))
        if arguments[0] == "check":
            listening.settimeout(PATIENCE_S)
            connection, _ = listening.accept()
            connection.close()
        else:
            command.said("waiting")
        began = time.monotonic()
        command.process.send_signal(signal.SIGINT)
        code, out, err = command.end()
    assert time.monotonic() - began < 2.0
    assert code in (1, 130)
    assert "Traceback" not in out + err


def _until(condition: Callable[[], Any]) -> None:
    stop = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < stop
        os.sched_yield()


@pytest.mark.long
def test_the_demonstration(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("PySide6")
    out = run("demo", "--headless", "--output", "shown").ended_well()
    assert "agreement of the phase with the simulated specimen" in out
    found = re.search(r"correlation (\d\.\d+)", out)
    assert found is not None
    assert float(found[1]) > 0.9
    assert {path.name for path in (tmp_path / "shown").iterdir()} >= {"result.h5", "viewer.png"}
