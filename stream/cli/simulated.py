"""Commands of the simulated detector: simulate, demo."""

from __future__ import annotations

import asyncio
import math
import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import h5py
import numpy as np
import typer
from rich.markup import escape

from detectors.errors import ConfigurationError
from detectors.messages import Encoding
from detectors.protocols.registry import PROTOCOLS, protocol_named
from detectors.simulator.dcu import SimulatedDCU
from detectors.simulator.merlin_device import SimulatedMerlin
from detectors.simulator.misbehaviour import Misbehaviour
from detectors.simulator.sender import Exposures, SendReport, serve
from detectors.simulator.simulation import SimulatedScan
from detectors.simulator.source import EncodedSource, FrameSource
from stream.cli.live import run_session
from stream.cli.options import parse_aberrations, parse_passes, parse_positive
from stream.cli.progress import console, progress_bar
from stream.config import parse_shape
from stream.files import open_dataset
from stream.offline import encoding_named, file_source
from stream.session import Session
from stream.session_options import SessionOptions, check_files

_SPECIMEN = "Simulated specimen and microscope (without FILE)"
_MISBEHAVE = "Misbehaviour (fractions of the frames, 0 to 1)"


def _option(text: str, panel: str | None = None) -> Any:
    return typer.Option(help=escape(text), rich_help_panel=panel)


def simulate(
    bind: Annotated[str, _option("Address to send from, for example tcp://127.0.0.1:31000.")],
    file: Annotated[
        Path | None, typer.Argument(help="A 4D-STEM file to send; without it, a specimen is simulated.")
    ] = None,
    dataset: Annotated[str | None, _option("Path of the 4-D dataset inside FILE, or a DECTRIS channel.")] = None,
    protocol: Annotated[str, _option(f"Stream protocol: {', '.join(PROTOCOLS)}.")] = "native",
    rate: Annotated[str, _option("Frames per second, or max: as fast as the receiver accepts.")] = "max",
    passes: Annotated[int, _option("Passes to send; 0 for ever.")] = 1,
    frames_per_message: Annotated[int, typer.Option(min=1, max=65536, help="Frames in a message.")] = 64,
    encoding: Annotated[
        str | None,
        _option(
            "Of the protocol, for example raw, lz4 or bslz4; as-stored: FILE's own bytes, never unpacked. (default: "
            "as-stored where FILE and protocol allow, else the protocol's usual one)"
        ),
    ] = None,
    pub: Annotated[
        bool, typer.Option("--pub", help="PUB instead of PUSH: several receivers, each gets everything.")
    ] = False,
    series: Annotated[
        int | None,
        typer.Option(min=-(2**63), max=2**63 - 1, help="Series id. (default: seconds since 1970)", show_default=False),
    ] = None,
    frame_time_us: Annotated[
        float, typer.Option(min=0.001, help="Time from frame to frame by the frames' time stamps [µs].")
    ] = 100.0,
    row_pause_us: Annotated[
        float,
        typer.Option(min=0.0, help="Pause after each row by the time stamps [µs], as a flyback makes it."),
    ] = 0.0,
    simplon: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Serve a DECTRIS detector's REST interface there (http://127.0.0.1:8080): frames go out when "
            "it is armed and triggered, series after series.",
            show_default=False,
        ),
    ] = None,
    control: Annotated[
        str | None,
        typer.Option(
            help="Serve Merlin's control port there, for example tcp://127.0.0.1:6341: frames go out when it is told.",
            show_default=False,
        ),
    ] = None,
    prepare: Annotated[
        bool, typer.Option("--prepare", help="Make every frame before sending the first, to keep a high rate.")
    ] = False,
    scan: Annotated[str, _option("Scan positions as ROWSxCOLUMNS.", _SPECIMEN)] = "128x128",
    specimen: Annotated[str, _option("lattice, boundary or particle.", _SPECIMEN)] = "lattice",
    detector: Annotated[str, _option("Detector pixels as ROWSxCOLUMNS.", _SPECIMEN)] = "96x96",
    dtype: Annotated[str, _option("uint8 or uint16.", _SPECIMEN)] = "uint16",
    dose: Annotated[float, _option("Electrons per frame.", _SPECIMEN)] = 1000.0,
    energy_kev: Annotated[float, _option("Electron energy [keV].", _SPECIMEN)] = 200.0,
    semiangle_mrad: Annotated[float, _option("Convergence semi-angle [mrad].", _SPECIMEN)] = 20.0,
    scan_step_angstrom: Annotated[float, _option("Distance of scan positions [Å].", _SPECIMEN)] = 3.905 / 16,
    detector_pixel_mrad: Annotated[float, _option("Angle of a detector pixel [mrad].", _SPECIMEN)] = 1.0,
    rotation_deg: Annotated[float, _option("Rotation of scan against detector axes [degrees].", _SPECIMEN)] = 0.0,
    transpose: Annotated[bool, _option("Swap the detector axes.", _SPECIMEN)] = False,
    aberrations: Annotated[str, _option("For example C10=-100,C12=20,phi12=30 [Å, degrees].", _SPECIMEN)] = "",
    seed: Annotated[int, _option("Seed of specimen, noise and misbehaviour.", _SPECIMEN)] = 0,
    drop: Annotated[float, _option("Lose these.", _MISBEHAVE)] = 0.0,
    duplicate: Annotated[float, _option("Send these twice.", _MISBEHAVE)] = 0.0,
    reorder: Annotated[float, _option("Send these late.", _MISBEHAVE)] = 0.0,
    corrupt: Annotated[float, _option("Damage these.", _MISBEHAVE)] = 0.0,
    stop_after: Annotated[
        int | None, _option("Fall silent after so many frames, without an end message.", _MISBEHAVE)
    ] = None,
) -> None:
    """A simulated detector: sends a simulated scan, or a file, as a detector would. Ends when all is delivered."""
    spoken = protocol_named(protocol)
    misbehaviour = Misbehaviour(drop, duplicate, reorder, corrupt, stop_after, seed)
    with ExitStack() as stack:
        source: FrameSource
        if file is not None:
            source = file_source(stack.enter_context(open_dataset(file, dataset)), spoken, encoding)
        else:
            maker = SimulatedScan(
                scan_shape=parse_shape(scan),
                scan_step_angstrom=(scan_step_angstrom,) * 2,
                energy_kev=energy_kev,
                semiangle_mrad=semiangle_mrad,
                aberrations=parse_aberrations(aberrations),
                rotation_deg=rotation_deg,
                transpose=transpose,
                detector_shape=parse_shape(detector),
                detector_pixel_mrad=(detector_pixel_mrad,) * 2,
                electrons_per_frame=dose,
                dtype=dtype,
                specimen=specimen,
                seed=seed,
            )
            source = EncodedSource(maker, encoding_named(spoken, encoding))
        if prepare and isinstance(source, EncodedSource):
            with progress_bar("making frames") as advance:
                source.prepare(lambda made: advance(made, source.frames_per_pass))
        per_second = parse_positive(rate, "--rate is a positive number of frames per second")
        device = _controlled(spoken.name, source, simplon, control, per_second)
        wanted = parse_passes(passes, 1) if device is None else None
        total = None if wanted is None else wanted * source.frames_per_pass
        with progress_bar("sending") as advance:
            report = asyncio.run(
                _serve(
                    device,
                    simplon or control or "",
                    source if device is None else device.source,
                    bind,
                    protocol=protocol,
                    pattern="pub" if pub else "push",
                    series=int(time.time()) if series is None else series,
                    passes=wanted,
                    rate=per_second,
                    trigger=device,
                    exposures=Exposures(
                        round(frame_time_us * 1e3), (source.start(0).scan_shape or (1, 1))[1], round(row_pause_us * 1e3)
                    ),
                    frames_per_message=frames_per_message,
                    misbehaviour=misbehaviour if misbehaviour != Misbehaviour(seed=seed) else None,
                    ready=lambda endpoint: console.print(
                        f"sending on {endpoint}, waiting for a receiver", highlight=False
                    ),
                    progress=lambda sent: advance(sent.frames, total),
                )
            )
    console.print(_summary(report), highlight=False)


def _controlled(
    protocol: str, source: FrameSource, simplon: str | None, control: str | None, rate: float | None
) -> SimulatedDCU | SimulatedMerlin | None:
    """The detector's control side, where one is to be simulated. Raises ``ConfigurationError``."""
    if simplon is not None and control is not None:
        raise ConfigurationError("--simplon is for DECTRIS detectors, --control for Merlin: give one of them")
    if simplon is not None:
        return SimulatedDCU(source, protocol, frame_time_s=1e-3 if rate is None else 1 / rate)
    if control is not None:
        if protocol != "merlin":
            raise ConfigurationError(f"--control is Merlin's control port: it needs --protocol merlin, not {protocol}")
        return SimulatedMerlin(source)
    return None


async def _serve(
    device: SimulatedDCU | SimulatedMerlin | None, control_address: str, source: FrameSource, bind: str, **options: Any
) -> SendReport:
    if device is None:
        return await serve(source, bind, **options)
    async with device.serving(control_address):
        console.print(f"controlled at {control_address}", highlight=False)
        return await serve(source, bind, **options)


def _summary(report: SendReport) -> str:
    done = report.misbehaviour
    text = (
        f"{report.frames} frames in {report.seconds:.2f} s ({report.frames / max(report.seconds, 1e-9):,.0f} frames/s)"
    )
    kinds = {name: getattr(done, name) for name in ("dropped", "duplicated", "reordered", "corrupted")}
    return text + "".join(f", {count} {name}" for name, count in kinds.items() if count)


#: The demonstration: about 15 seconds of scanning a crystal with defects, seen by a rotated, defocused microscope.
_DEMO = SimulatedScan(
    scan_shape=(128, 128),
    scan_step_angstrom=(3.905 / 16, 3.905 / 16),
    semiangle_mrad=20.0,
    rotation_deg=25.0,
    aberrations={"C10": -60.0, "C12": 15.0, "phi12": 40.0},
    detector_shape=(96, 96),
    detector_pixel_mrad=(1.0, 1.0),
    bf_centre_px=(47.3, 48.2),
    electrons_per_frame=4000.0,
    dtype="uint8",
    specimen="lattice",
)
_DEMO_RATE = 1200.0
#: How long the window stays after the scan [s].
_LOOK_S = 8.0


def demo(
    headless: Annotated[bool, typer.Option("--headless", help="No window, even where there is a display.")] = False,
    output: Annotated[Path, typer.Option(help="Folder for the pictures and the result.")] = Path("demo-output"),
) -> None:
    """The whole program in half a minute: simulated detector, ZeroMQ, live reconstruction, viewer. Ends by itself."""
    check_files(SessionOptions(["demo"], output=output / "result.h5"))
    window = not headless and _has_display()
    if not window:
        console.print(
            "no display: pictures instead of a window" if not headless else "headless: pictures instead of a window"
        )
    asyncio.run(_demo(window, output))


def _has_display() -> bool:
    return sys.platform != "linux" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


async def _demo(window: bool, output: Path) -> None:
    endpoint: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    source = EncodedSource(_DEMO, Encoding.BSLZ4)
    sender = asyncio.create_task(
        serve(source, "tcp://127.0.0.1:*", rate=_DEMO_RATE, frames_per_message=16, ready=endpoint.set_result)
    )
    result = output / "result.h5"
    options = SessionOptions(
        [await endpoint],
        output=result,
        publish="tcp://127.0.0.1:*",
        timeout_s=30.0,
        series_timeout_s=30.0,
        linger_s=math.inf,
    )

    async def alongside(session: Session) -> None:
        if window:
            await _until(session, 1.0)
            await asyncio.sleep(_LOOK_S)
        else:
            for share, name in ((0.5, "viewer-half-way.png"), (1.0, "viewer.png")):
                await _until(session, share)
                await _picture(session, output / name)
        session.stop()

    began = time.monotonic()
    try:
        await run_session(options, viewer=window, alongside=alongside)
        await sender
    finally:
        sender.cancel()
    _report_demo(result, time.monotonic() - began)


async def _until(session: Session, share: float) -> None:
    """Wait until this share of the rows is there; for all of them, until the series is finished."""
    async for snapshot in session:
        if snapshot.state == "finished" or (
            snapshot.scan_shape and snapshot.rows_acquired >= share * snapshot.scan_shape[0] and share < 1
        ):
            return


async def _picture(session: Session, path: Path) -> None:
    """What the viewer shows now, made by the viewer itself."""
    assert session.publish_endpoint is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "viewer", session.publish_endpoint, "--screenshot", str(path), "--after-s", "1.5"]
    process = await asyncio.create_subprocess_exec(*command, env={**os.environ, "QT_QPA_PLATFORM": "offscreen"})
    if await process.wait():
        console.print("no picture was made (the viewer's message is above); the reconstruction goes on")


def _report_demo(path: Path, seconds: float) -> None:
    with h5py.File(path) as file:
        phase = file["phase"][()]
    expected = _DEMO.expected_ssb_phase
    r = float(np.corrcoef(phase.ravel(), expected.ravel())[0, 1])
    slope = float(np.polyfit((expected - expected.mean()).ravel(), phase.ravel(), 1)[0])
    console.print(
        f"live reconstruction of {phase.shape[0]}x{phase.shape[1]} positions took {seconds:.1f} s", highlight=False
    )
    console.print(
        f"agreement of the phase with the simulated specimen: correlation {r:.3f}, scale {slope:.3f} "
        "(1 is perfect; the rest is shot noise)",
        highlight=False,
    )
    console.print(
        f"look at the pictures in [bold]{path.parent}[/bold]; `liveptycho info {path}` shows what the result holds"
    )
