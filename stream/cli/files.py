"""Commands on files: reconstruct, replay, info."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.markup import escape
from rich.table import Table

from detectors.errors import ConfigurationError
from detectors.protocols.registry import PROTOCOLS, protocol_named
from detectors.simulator.sender import serve
from stream.cli.options import Device, Threads, parse_passes, parse_positive, with_settings
from stream.cli.progress import console, progress_bar
from stream.config import Layer
from stream.files import open_dataset
from stream.offline import describe_file, file_source, reconstruct_file
from stream.parameters import Parameters
from stream.recording import is_recording
from stream.replay import replay_recording
from stream.result import Result, require_writable
from stream.snapshot import left_out_sentence

DatasetName = Annotated[
    str | None, typer.Option(help="Path of the 4-D dataset inside an HDF5 file, or a DECTRIS channel.")
]


@with_settings
def reconstruct(
    layers: list[Layer],
    file: Annotated[
        Path, typer.Argument(help="A data file (HDF5, DECTRIS, EMD / py4DSTEM, .mib, .npy, ...) or a recording.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the result (HDF5, NeXus).")],
    dataset: DatasetName = None,
    passes: Annotated[
        int | None, typer.Option(help="Passes to take from a recording. (default: all)", show_default=False)
    ] = None,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Reconstruct a file, with the same engine as a live scan."""
    _refuse_same_file(file, output)
    require_writable(output)
    with progress_bar(file.name) as advance:
        result = reconstruct_file(
            file,
            layers,
            dataset=dataset,
            device=device,
            passes=parse_passes(passes, 0),
            progress=advance,
            threads=threads,
        )
    result.save(output)
    report_result(result, output)


def _refuse_same_file(file: Path, output: Path) -> None:
    if file.exists() and output.exists() and file.samefile(output):
        raise ConfigurationError(f"the result would overwrite its own source {file}; choose another --output")


def report_result(result: Result, output: Path | None) -> None:
    """Say in a few lines what came out."""
    rows, columns = result.setup.scan.shape
    counters = result.counters
    if "phase" in result.images:
        phase = result.phase[result.positions_received]
        spread = f"{phase.min():.3f} to {phase.max():.3f} rad" if phase.size else "nothing received"
        console.print(f"{result.setup.method.name}: {rows}x{columns} positions, phase {spread}")
    else:
        console.print(f"{rows}x{columns} positions, images: {', '.join(result.images)}")
    if result.channels_left_out:
        console.print(left_out_sentence(result.channels_left_out), highlight=False)
    lost = {name: count for name, count in counters.as_dict().items() if name != "received" and count}
    console.print(f"frames received {counters.received}" + "".join(f", {name} {count}" for name, count in lost.items()))
    if output is not None:
        console.print(f"result in [bold]{output}[/bold]")


def replay(
    file: Annotated[Path, typer.Argument(help="A recording (`liveptycho record`, `live --record`) or a data file.")],
    bind: Annotated[str, typer.Option(help="Address to send from, for example tcp://127.0.0.1:31000.")],
    speed: Annotated[str, typer.Option(help="Factor on the recorded speed, or max.")] = "1",
    pub: Annotated[
        bool, typer.Option("--pub", help="PUB instead of PUSH: several receivers, each gets everything.")
    ] = False,
    protocol: Annotated[
        str | None,
        typer.Option(
            help=f"Of a data file: {', '.join(PROTOCOLS)}. (default: its detector's; a recording keeps its own)",
            show_default=False,
        ),
    ] = None,
    dataset: DatasetName = None,
) -> None:
    """Send a recorded stream again, as it came: same messages' content, same order, same times. Or a data file, as its
    detector would have sent it, with packed frames byte for byte.
    """
    factor = parse_positive(speed, "--speed is a positive factor")
    pattern: Literal["push", "pub"] = "pub" if pub else "push"

    def ready(endpoint: str) -> None:
        console.print(f"sending on {endpoint}, waiting for a receiver", highlight=False)

    with progress_bar(file.name) as advance:
        if not is_recording(file):
            sent = asyncio.run(_replay_data(file, bind, factor, pattern, protocol, dataset, advance, ready))
        elif protocol is not None or dataset is not None:
            raise ConfigurationError(
                f"{file} is a recording: it is sent in its own protocol, leave --protocol and --dataset out"
            )
        else:
            sent = asyncio.run(
                replay_recording(file, bind, speed=factor, pattern=pattern, progress=advance, ready=ready)
            )
    console.print(f"{sent} frames delivered")


async def _replay_data(
    file: Path,
    bind: str,
    speed: float | None,
    pattern: Literal["push", "pub"],
    protocol: str | None,
    dataset: str | None,
    advance: Callable[[int, int | None], None],
    ready: Callable[[str], None],
) -> int:
    """Send a data file as one series; returns how many frames. ``speed``: as in ``replay``, None for the fastest."""
    with open_dataset(file, dataset) as data:
        spoken = protocol_named(protocol or data.protocol)
        frame_time_s = data.settings.get("frame_time_s")
        if not isinstance(frame_time_s, float) or not frame_time_s > 0:
            frame_time_s = None
        if speed is not None and frame_time_s is None:
            console.print(f"{file.name} does not say its frame rate: as fast as the receiver takes it", highlight=False)
        report = await serve(
            file_source(data, spoken),
            bind,
            protocol=spoken.name,
            pattern=pattern,
            series=int(time.time()),
            rate=None if speed is None or frame_time_s is None else speed / frame_time_s,
            ready=ready,
            progress=lambda sent: advance(sent.frames, data.frames),
        )
    return report.frames


@with_settings
def info(
    layers: list[Layer],
    file: Annotated[Path, typer.Argument(help="A data file, a recording or a result.")],
    dataset: DatasetName = None,
) -> None:
    """Show what a file holds, each setting and where it comes from, and the bright-field disk."""
    description = describe_file(file, layers, dataset=dataset)
    table = Table(title=str(file), show_header=False, title_justify="left")
    for label, text in description.rows:
        table.add_row(escape(label), escape(text))
    console.print(table)
    if description.parameters is not None:
        console.print(settings_table(description.parameters))
    for note in description.notes:
        console.print(f"note: {note}", highlight=False, markup=False)


def settings_table(parameters: Parameters) -> Table:
    """Every setting with its value and its source."""
    table = Table("setting", "value", "from", title="settings", title_justify="left")
    for key, value in parameters.values.items():
        if value is not None:
            shown = (
                ", ".join(f"{v:.6g}" if isinstance(v, float) else str(v) for v in value)
                if isinstance(value, tuple)
                else str(value)
            )
            table.add_row(key, escape(shown), escape(parameters.sources[key]))
    return table
