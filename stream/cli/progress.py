"""Progress in the terminal: a bar with rate and remaining time; quiet when the output is not a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

#: Lines are not wrapped: they may be read by other programs.
console = Console(soft_wrap=True)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        """Frames a second."""
        return Text(f"{task.speed:,.0f} frames/s" if task.speed else "", style="cyan")


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int | None], None]]:
    """A bar; call what it gives with (frames done, frames in all or None)."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
