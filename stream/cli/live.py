"""Commands on live streams: live, record, view, check."""

from __future__ import annotations

import asyncio
import math
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer
from rich.live import Live
from rich.table import Table
from rich.text import Text

from detectors.errors import ConfigurationError
from detectors.protocols.registry import protocol_named
from stream.check import check_address
from stream.cli.files import report_result
from stream.cli.options import Device, Protocol, Threads, parse_passes, with_settings
from stream.cli.progress import console, progress_bar
from stream.config import Layer
from stream.control.choose import detector_control
from stream.record import record_stream
from stream.session import Session
from stream.session_options import SessionOptions
from stream.snapshot import Snapshot, left_out_sentence

#: A start that takes longer is explained [s].
_LONG_START_S = 2.0

DEFAULT_PUBLISH = "tcp://127.0.0.1:31010"

_ADDRESS = typer.Argument(
    metavar="ADDRESS",
    help="The detector's stream, for example tcp://192.168.0.5:31001; several, separated by commas, share one.",
    show_default=False,
)
Addresses = Annotated[str, _ADDRESS]
_CONTROL = "Beside the stream: the detector's control interface"


class Triggers(StrEnum):
    """What begins an exposure, or a row of them."""

    software = "software"
    pixel = "pixel"
    line = "line"
    gate = "gate"


Bind = Annotated[bool, typer.Option("--bind", help="Bind ADDRESS and let the detector connect.")]
Sub = Annotated[bool, typer.Option("--sub", help="The detector publishes (PUB); default is PUSH.")]
Timeout = Annotated[
    float | None,
    typer.Option(
        min=0.1,
        help="Give up when nothing comes for so many seconds. "
        "(default without a viewer: 300 before the start, 30 within a series; with one: never). "
        "After a series, --follow waits for ever.",
        show_default=False,
    ),
]


@with_settings
def live(
    layers: list[Layer],
    address: Annotated[str | None, _ADDRESS] = None,
    protocol: Protocol = "native",
    bind: Bind = False,
    sub: Sub = False,
    simplon: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="The REST interface of a DECTRIS detector, http://HOST:PORT: energy, thresholds and pixel mask are "
            "asked there; ADDRESS may be left out. Without --trigger nothing is changed.",
            rich_help_panel=_CONTROL,
        ),
    ] = None,
    control: Annotated[
        str | None,
        typer.Option(help="Control port of a Merlin detector, for example tcp://HOST:6341.", rich_help_panel=_CONTROL),
    ] = None,
    trigger: Annotated[
        Triggers | None,
        typer.Option(
            help="Arm the detector for one scan. software: begin at once. pixel, line: wait for the scan generator's "
            "pulse for each position or row. gate: expose while its pulse is high.",
            rich_help_panel=_CONTROL,
        ),
    ] = None,
    frame_time_us: Annotated[
        float | None, typer.Option(help="With --trigger: time from frame to frame [µs].", rich_help_panel=_CONTROL)
    ] = None,
    count_time_us: Annotated[
        float | None, typer.Option(help="With --trigger: exposure of a frame [µs].", rich_help_panel=_CONTROL)
    ] = None,
    record: Annotated[Path | None, typer.Option(help="Record the stream into this file at the same time.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the result of the series there (HDF5, NeXus).")
    ] = None,
    passes: Annotated[
        int | None,
        typer.Option(
            help="Passes to take: the newest replaces the older one row by row; 0 for ever. "
            "(default: as many as the series announces)",
            show_default=False,
        ),
    ] = None,
    no_viewer: Annotated[
        bool, typer.Option("--no-viewer", help="Open no viewer; end when the series has ended.")
    ] = False,
    publish: Annotated[
        str | None,
        typer.Option(
            help="Address that viewers connect to; control is one port further. "
            f"(default: {DEFAULT_PUBLISH} with a viewer)",
            show_default=False,
        ),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", help="After a series, wait for the next one.")] = False,
    timeout: Timeout = None,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Reconstruct a stream while it is being scanned, and show the phase image refining."""
    if not no_viewer and publish is None:
        publish = DEFAULT_PUBLISH
    if address is None:
        if simplon is None:
            raise ConfigurationError("ADDRESS is missing: where the detector's stream is, for example tcp://HOST:31001")
        address = stream_address(simplon, protocol)
    options = SessionOptions(
        address.split(","),
        protocol,
        bind,
        "sub" if sub else "pull",
        layers,
        parse_passes(passes, 0),
        device,
        record,
        output,
        publish,
        follow,
        linger_s=0.0 if no_viewer else math.inf,
        timeout_s=300.0 if timeout is None and no_viewer and not follow else timeout,
        series_timeout_s=30.0 if timeout is None and no_viewer else timeout,
        threads=threads,
        control=detector_control(protocol, simplon, control),
        trigger=None if trigger is None else trigger.value,
        frame_time_s=None if frame_time_us is None else frame_time_us * 1e-6,
        count_time_s=None if count_time_us is None else count_time_us * 1e-6,
    )
    incomplete = asyncio.run(run_session(options, viewer=not no_viewer))
    if incomplete:
        raise ConfigurationError(f"the series is not complete: {incomplete}")


def stream_address(simplon: str, protocol: str) -> str:
    """Where the stream of a DECTRIS detector is, when only its REST interface is named."""
    host = urlsplit(simplon if "//" in simplon else f"//{simplon}").hostname
    if not host:
        raise ConfigurationError(f"{simplon!r} is not the address of a REST interface; write http://HOST")
    return f"tcp://{f'[{host}]' if ':' in host else host}:{protocol_named(protocol).default_port}"


async def run_session(
    options: SessionOptions, *, viewer: bool, alongside: Callable[[Session], Coroutine[Any, Any, None]] | None = None
) -> str:
    """Run a session in the terminal; returns why the last series is incomplete, or an empty text.

    ``alongside`` is run beside it and ended with it.
    """
    async with patiently_opened(Session(options)) as session:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, session.stop)
        with ExitStack() as stack:
            if viewer:
                assert session.publish_endpoint is not None
                stack.enter_context(_ViewerProcess(session))
            if session.publish_endpoint is not None:
                console.print(f"images are published on {session.publish_endpoint}", highlight=False)
            console.print(f"listening at {', '.join(session.endpoints)}, waiting for a series", highlight=False)
            beside = None if alongside is None else asyncio.create_task(alongside(session), name="alongside")
            try:
                await _show(session)
            finally:
                if beside is not None:
                    beside.cancel()
                    await asyncio.gather(beside, return_exceptions=True)
        if session.result is not None:
            report_result(session.result, session.saved)
            if session.recorded is not None:
                console.print(f"recording in [bold]{session.recorded}[/bold]")
        return session.incomplete


@asynccontextmanager
async def patiently_opened(session: Session) -> AsyncIterator[Session]:
    """The session, entered; when that takes long, the user is told why."""

    async def tell() -> None:
        await asyncio.sleep(_LONG_START_S)
        console.print("making ready: the first start after an installation compiles for up to half a minute ...")

    telling = asyncio.create_task(tell())
    async with AsyncExitStack() as stack:
        try:
            await stack.enter_async_context(session)
        finally:
            telling.cancel()
            await asyncio.gather(telling, return_exceptions=True)
        yield session


async def _show(session: Session) -> None:
    """One line in the terminal, refreshed while snapshots come; what the engine holds is said once."""
    told: object = None
    said = session.snapshot.message
    with Live(console=console, refresh_per_second=4, transient=True) as display:
        async for snapshot in session:
            run = session.reconstruction
            if run is not None and run.engine is not None and run is not told:
                told = run
                console.print(
                    f"{run.engine.device.name}: {run.engine.plan.total / 1e6:,.0f} MB at most ({run.engine.plan})",
                    highlight=False,
                )
                if left_out := run.engine.setup.left_out:
                    console.print(left_out_sentence(left_out), highlight=False)
                for note in run.notes:
                    console.print(f"note: {note}", highlight=False, markup=False)
            if console.is_terminal:
                display.update(status_line(snapshot))
            elif snapshot.state == "waiting" and _without_numbers(snapshot.message) != _without_numbers(said):
                said = snapshot.message
                console.print(said, highlight=False, markup=False)


def _without_numbers(message: str) -> str:
    """A message that counts seconds is the same message."""
    return re.sub(r"\d+", "", message)


def status_line(snapshot: Snapshot) -> Text:
    """The state of a session in one line."""
    line = Text(f"{snapshot.state} ", style="bold")
    if snapshot.scan_shape is not None:
        line.append(
            f"pass {snapshot.passes_done + (snapshot.state == 'scanning')}, "
            f"row {(snapshot.scan_row or 0) + 1}/{snapshot.scan_shape[0]}, "
        )
        line.append(f"{snapshot.frames_per_s:,.0f} frames/s, {snapshot.megabytes_per_s:.1f} MB/s")
        if snapshot.latency_ms is not None:
            line.append(f", {snapshot.latency_ms:.0f} ms")
    counters = snapshot.counters
    for name in ("missing", "duplicate", "late", "undecodable", "outside", "unclaimed"):
        if count := getattr(counters, name):
            line.append(f", {name} {count}", style="yellow")
    if snapshot.message:
        line.append(f"  {snapshot.message}", style="dim")
    return line


class _ViewerProcess:
    """The viewer, in a process of its own; the session ends when its window is closed."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> None:
        assert self._session.publish_endpoint is not None
        self._process = subprocess.Popen([sys.executable, "-m", "viewer", _local(self._session.publish_endpoint)])
        self._watch = asyncio.create_task(self._wait(), name="viewer process")

    async def _wait(self) -> None:
        assert self._process is not None
        code = await asyncio.to_thread(self._process.wait)
        if code not in (0, -signal.SIGINT, -signal.SIGTERM):
            console.print(
                "the viewer did not stay open (its message is above); the session goes on without it, Ctrl-C ends it"
            )
        else:
            self._session.stop()

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        self._watch.cancel()
        if self._process.poll() is None:
            self._process.terminate()


def _local(endpoint: str) -> str:
    """Where to reach, from this machine, a socket that is bound on all interfaces."""
    return endpoint.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")


def record(
    address: Addresses,
    file: Annotated[Path, typer.Argument(help="Where to write the recording (HDF5); must not exist.")],
    protocol: Protocol = "native",
    bind: Bind = False,
    sub: Sub = False,
    timeout: Timeout = None,
) -> None:
    """Record one series of a stream as it comes, without reconstructing it; compressed frames stay compressed."""
    with progress_bar(file.name) as advance:
        done = asyncio.run(
            record_stream(
                address.split(","),
                file,
                protocol=protocol,
                bind=bind,
                pattern="sub" if sub else "pull",
                timeout_s=timeout,
                progress=advance,
                ready=lambda where: console.print(
                    f"recording {', '.join(where)}, waiting for a series", highlight=False
                ),
            )
        )
    console.print(f"{done.frames} frames recorded in [bold]{file}[/bold]")
    if done.incomplete:
        raise ConfigurationError(f"the recording is not complete: {done.incomplete}")


def view(
    address: Annotated[str, typer.Argument(help="Where a session publishes, for example tcp://microscope-pc:31010.")],
    screenshot: Annotated[
        Path | None, typer.Option(help="Save a picture of the window there after a few seconds, and end.")
    ] = None,
) -> None:
    """Open a viewer on a running session, also from another machine."""
    command = [sys.executable, "-m", "viewer", address]
    if screenshot is not None:
        command += ["--screenshot", str(screenshot)]
    raise typer.Exit(subprocess.run(command, check=False).returncode)


def check(
    address: Annotated[str, typer.Argument(help="ZeroMQ address of the detector's stream.")],
    protocol: Protocol = "native",
    bind: Bind = False,
    sub: Sub = False,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to wait for messages.")] = 5.0,
) -> None:
    """See what arrives at an address: a table of OK / TIMEOUT / ERROR with advice. Takes messages off the stream."""
    findings = asyncio.run(
        check_address(address, protocol=protocol, bind=bind, pattern="sub" if sub else "pull", timeout_s=timeout)
    )
    table = Table("check", "result", "what was seen, and what to do")
    colour = {"OK": "green", "TIMEOUT": "yellow", "ERROR": "red", "-": "dim"}
    for finding in findings:
        table.add_row(finding.name, Text(finding.verdict, style=colour[finding.verdict]), finding.text)
    console.print(table)
    if any(finding.verdict in ("TIMEOUT", "ERROR") for finding in findings):
        raise typer.Exit(1)
