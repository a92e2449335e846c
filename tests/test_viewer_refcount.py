"""PySide6 6.12.0 on CPython 3.11 loses references to None and True at each repaint, and aborts after some hundred."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.viewer_support import snapshot

pytest.importorskip("PySide6.QtWidgets", reason="the viewer's window needs PySide6", exc_type=ImportError)
pytest.importorskip("pyqtgraph", reason="the viewer's window needs pyqtgraph")

from PySide6 import QtWidgets

from viewer import theme
from viewer.model import Model
from viewer.window import Window

REPAINTS = 300


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="None and True are immortal from CPython 3.12 on")
def test_repaints_lose_no_references(qtbot: Any, qapp: QtWidgets.QApplication, tmp_path: Path) -> None:
    theme.apply(qapp)
    model = Model("tcp://127.0.0.1:1")
    window = Window(model, tmp_path)
    qtbot.addWidget(window)
    window.show()
    qtbot.waitExposed(window)
    shown = [snapshot(n, shape=(16, 16), rows=8) for n in (1, 2)]

    def repaint(times: int) -> None:
        for n in range(times):
            model.accept(shown[n % 2])
            window.refresh()
            window.screen_.phase.canvas.viewport().repaint()

    repaint(10)
    before = {value: sys.getrefcount(value) for value in (None, True)}
    repaint(REPAINTS)
    for value, count in before.items():
        # One lost a repaint would be REPAINTS; caches may let go of a few.
        assert sys.getrefcount(value) > count - REPAINTS // 3, f"{value} loses references: pin another PySide6"
