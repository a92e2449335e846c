"""Colours, fonts, palette: everything that decides how the viewer looks."""

from __future__ import annotations

import numpy as np
import pyqtgraph as pg
from PySide6 import QtGui, QtWidgets

WINDOW = "#17191d"
PANEL = "#1e2126"
FIELD = "#262a31"
EDGE = "#363b44"
TEXT = "#dfe3ea"
QUIET = "#969eab"
ACCENT = "#4fb3ff"
GOOD = "#5fd08a"
WARN = "#ffb545"
BAD = "#ff6b61"
CANVAS = "#0f1114"
EMPTY = "#1c2531"
EMPTY_HATCH = "#2c3a4c"
MARK = "#39d6e0"
"""circles and the scan row, on images"""

#: Names of the colour maps and where pyqtgraph keeps them; all perceptually uniform.
COLOR_MAPS: dict[str, str] = {
    "gray": "CET-L1",
    "inferno": "inferno",
    "viridis": "viridis",
    "cividis": "cividis",
    "blue-red": "CET-D1A",
}

#: What the key for the next map goes through, for the phase.
PHASE_MAPS = ("gray", "viridis", "inferno", "cividis", "blue-red")


def colors(name: str) -> np.ndarray:
    """The colour map ``name`` of COLOR_MAPS: uint8, shape (256, 3), RGB."""
    return np.asarray(pg.colormap.get(COLOR_MAPS[name]).getLookupTable(nPts=256, alpha=False), dtype=np.uint8)


def apply(app: QtWidgets.QApplication) -> None:
    """Dark, whatever the desktop says. A palette, because the offscreen platform ignores the colour scheme hint."""
    pg.setConfigOptions(imageAxisOrder="row-major", antialias=True)
    app.setStyle("Fusion")
    font = app.font()
    font.setPointSizeF(9.5)
    app.setFont(font)
    role = QtGui.QPalette.ColorRole
    palette = QtGui.QPalette()
    for roles, color in (
        ((role.Window, role.AlternateBase, role.ToolTipBase), WINDOW),
        ((role.Base, role.Button), FIELD),
        ((role.WindowText, role.Text, role.ButtonText, role.ToolTipText), TEXT),
        ((role.BrightText,), BAD),
        ((role.Highlight, role.Link, role.Accent), ACCENT),
        ((role.HighlightedText,), WINDOW),
        ((role.PlaceholderText,), QUIET),
        ((role.Light, role.Midlight, role.Mid), EDGE),
        ((role.Dark, role.Shadow), CANVAS),
    ):
        for one in roles:
            palette.setColor(one, QtGui.QColor(color))
    for one in (role.WindowText, role.Text, role.ButtonText):
        palette.setColor(QtGui.QPalette.ColorGroup.Disabled, one, QtGui.QColor("#666d78"))
    app.setPalette(palette)
    app.setStyleSheet(STYLE)


STYLE = f"""
QFrame#panel {{ background: {PANEL}; border: 1px solid {EDGE}; border-radius: 4px; }}
QLabel#title {{ font-weight: bold; color: {TEXT}; }}
QLabel#quiet {{ color: {QUIET}; }}
QLabel#quiet:disabled {{ color: #666d78; }}
QLabel#readout {{ color: {ACCENT}; }}
QLabel#notice {{ background: rgba(15, 17, 20, 225); border: 1px solid {WARN}; border-radius: 6px; color: {WARN};
    font-size: 13pt; font-weight: bold; padding: 12px 18px; }}
QLabel#frozen {{ background: {ACCENT}; color: {WINDOW}; border-radius: 3px; font-size: 11pt; font-weight: bold;
    padding: 3px 10px; }}
QStatusBar {{ background: {PANEL}; border-top: 1px solid {EDGE}; }}
QStatusBar::item {{ border: none; }}
QProgressBar {{ background: {FIELD}; border: 1px solid {EDGE}; border-radius: 3px; height: 12px; text-align: center; }}
QProgressBar::chunk {{ background: #2f6c99; border-radius: 2px; }}
QSplitter::handle {{ background: {WINDOW}; }}
QToolTip {{ background: {FIELD}; color: {TEXT}; border: 1px solid {EDGE}; }}
"""
