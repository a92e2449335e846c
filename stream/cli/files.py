"""Commands on files: reconstruct, replay, info."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from detectors.errors import ConfigurationError
from stream.cli.options import Device, Threads, parse_passes, parse_positive, with_settings
from stream.cli.progress import console, progress_bar
from stream.config import Layer
from stream.offline import describe_file, reconstruct_file
from stream.parameters import Parameters
from stream.replay import replay_recording
from stream.result import Result, require_writable


@with_settings
def reconstruct(
    layers: list[Layer],
    file: Annotated[Path, typer.Argument(help="A data file (HDF5, EMD / py4DSTEM) or a recording.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the result (HDF5, NeXus).")],
    dataset: Annotated[str | None, typer.Option(help="Path of the 4-D dataset inside an HDF5 file.")] = None,
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
    phase = result.phase[result.positions_received]
    counters = result.counters
    spread = f"{phase.min():.3f} to {phase.max():.3f} rad" if phase.size else "nothing received"
    console.print(
        f"{result.setup.method.name}: {result.object.shape[0]}x{result.object.shape[1]} positions, phase {spread}"
    )
    lost = {name: count for name, count in counters.as_dict().items() if name != "received" and count}
    console.print(f"frames received {counters.received}" + "".join(f", {name} {count}" for name, count in lost.items()))
    if output is not None:
        console.print(f"result in [bold]{output}[/bold]")


def replay(
    file: Annotated[Path, typer.Argument(help="A recording made by `liveptycho record` or `live --record`.")],
    bind: Annotated[str, typer.Option(help="ZeroMQ address to send from, for example tcp://127.0.0.1:31000.")],
    speed: Annotated[str, typer.Option(help="Factor on the recorded speed, or max.")] = "1",
    pub: Annotated[
        bool, typer.Option("--pub", help="PUB instead of PUSH: several receivers, each gets everything.")
    ] = False,
) -> None:
    """Send a recorded stream again, as it came: same messages' content, same order, same times."""
    factor = parse_positive(speed, "--speed is a positive factor")
    with progress_bar(file.name) as advance:
        sent = asyncio.run(
            replay_recording(
                file,
                bind,
                speed=factor,
                pattern="pub" if pub else "push",
                progress=advance,
                ready=lambda endpoint: console.print(f"sending on {endpoint}, waiting for a receiver"),
            )
        )
    console.print(f"{sent} frames delivered")


@with_settings
def info(
    layers: list[Layer],
    file: Annotated[Path, typer.Argument(help="A data file, a recording or a result.")],
    dataset: Annotated[str | None, typer.Option(help="Path of the 4-D dataset inside an HDF5 file.")] = None,
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
