"""Every key of the viewer, once: the window binds them from this table, and the help dialog is written from it."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

from viewer.channels import SECOND


@dataclass(frozen=True)
class Key:
    """Keys that call one method of the window."""

    keys: tuple[str, ...]
    """as QKeySequence reads them; any of them"""
    action: str
    """the window's method ``action_...`` without its prefix"""
    text: str
    group: str
    argument: int | None = None


KEYS: tuple[Key, ...] = (
    Key(("Space",), "freeze", "freeze the display (receiving goes on), or let it run again", "Session"),
    Key(("S",), "save", "save the window as PNG and all shown data as HDF5", "Session"),
    Key(("O",), "controls", "show or hide the optics panel", "Session"),
    Key(("F11",), "full_screen", "full screen", "Session"),
    Key(("F1", "?"), "help", "this list", "Session"),
    Key(("Ctrl+Q",), "quit", "close the viewer; the session goes on", "Session"),
    *(
        Key((str(n),), "channel", f"second image: {channel.title}", "Images", n - 1)
        for n, channel in enumerate(SECOND, start=1)
    ),
    Key(("]",), "next_channel", "second image: the next channel", "Images", 1),
    Key(("[",), "next_channel", "second image: the channel before", "Images", -1),
    Key(("M",), "next_map", "next colour map of the phase", "Images"),
    Key(("L",), "next_scale", "pattern: logarithm, square root, linear", "Images"),
    Key(("I",), "smooth", "interpolate between pixels", "Images"),
    Key(("C",), "lock_contrast", "lock the contrast of all images, or unlock it", "Contrast and view"),
    Key(("A",), "automatic_contrast", "automatic contrast for all images", "Contrast and view"),
    Key(("F",), "fit", "show the whole images", "Contrast and view"),
    Key(("X",), "crosshair", "crosshair on or off", "Contrast and view"),
    Key(("R",), "row_line", "line at the row being scanned on or off", "Contrast and view"),
)

MOUSE: tuple[tuple[str, str], ...] = (
    ("wheel", "zoom; phase and second image together"),
    ("drag", "pan"),
    ("click", "pin the crosshair, or release it"),
    ("double-click", "show the whole image"),
    ("drag on a colour bar", "change the upper or the lower limit, and lock it"),
    ("double-click on a colour bar", "automatic contrast for this image"),
)


def help_html() -> str:
    """All keys and mouse actions as an HTML table."""
    rows = []
    for group in dict.fromkeys(key.group for key in KEYS):
        rows.append(f"<tr><td colspan='2'><br><b>{escape(group)}</b></td></tr>")
        rows += [_row(" or ".join(key.keys), key.text) for key in KEYS if key.group == group]
    rows.append("<tr><td colspan='2'><br><b>Mouse</b></td></tr>")
    rows += [_row(*action) for action in MOUSE]
    return f"<table cellspacing='3'>{''.join(rows)}</table>"


def _row(keys: str, text: str) -> str:
    return f"<tr><td style='padding-right: 18px'><code>{escape(keys)}</code></td><td>{escape(text)}</td></tr>"
