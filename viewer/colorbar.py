"""The colour bar below an image: values with their unit; drag it to lock other limits, double-click to unlock."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from PySide6 import QtCore, QtGui, QtWidgets

from viewer import theme
from viewer.contrast import Limits, LinearScale, Scale, widened
from viewer.render import color_wheel

BAR_PX, HEIGHT_PX = 12, 34
#: The same bar seen as a wheel: as large as fits.
WHEEL_PX = 32

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


class ColorBar(QtWidgets.QWidget):
    """Repaints only when its limits, colours or scale change: it costs nothing while contrast is locked."""

    dragged = QtCore.Signal(object)
    """limits that the user asks for: (low, high)"""
    released = QtCore.Signal()
    """the user wants automatic limits back"""

    def __init__(self) -> None:
        super().__init__()
        self.setFixedHeight(HEIGHT_PX)
        self.setToolTip("drag the left or the right half to change that limit; double-click: automatic again")
        self.limits: Limits = (0.0, 1.0)
        self.unit = ""
        self._scale: Scale = LinearScale()
        self._gradient: QtGui.QImage | None = None
        self._locked = False
        self._empty = True
        self._grip: tuple[float, bool, Limits] | None = None

    def set_colors(self, colors: np.ndarray | None) -> None:
        """uint8, shape (256, 3), RGB; None for a vector field, whose bar is a wheel."""
        if colors is None:
            self._gradient = None
        else:
            pixels = np.ascontiguousarray(colors)
            image = QtGui.QImage(pixels.data, 256, 1, 768, QtGui.QImage.Format.Format_RGB888)
            self._gradient = image.copy()  # of its own: the array's memory goes with this call
        self.update()

    def show_limits(self, limits: Limits | None, unit: str, scale: Scale, locked: bool) -> None:
        """``limits`` [unit]; None: nothing to show yet."""
        new = (limits or self.limits, unit, scale, locked, limits is None)
        if new != (self.limits, self.unit, self._scale, self._locked, self._empty):
            self.limits, self.unit, self._scale, self._locked, self._empty = new
            self.update()

    def paintEvent(self, event: QtGui.QPaintEvent) -> None:  # noqa: N802
        painter = QtGui.QPainter(self)
        painter.setRenderHint(QtGui.QPainter.RenderHint.Antialiasing, self._gradient is None)
        if self._gradient is None:
            self._paint_wheel(painter)
        else:
            self._paint_bar(painter, self._gradient)
        unit = QtCore.QRect(0, 0, self.width(), BAR_PX + 3)
        right, middle = QtCore.Qt.AlignmentFlag.AlignRight, QtCore.Qt.AlignmentFlag.AlignVCenter
        painter.setPen(QtGui.QColor(theme.QUIET))
        painter.drawText(unit, right | middle, self.unit)
        if self._locked:
            painter.setPen(QtGui.QColor(theme.WARN))
            painter.drawText(unit.translated(0, HEIGHT_PX - BAR_PX - 4), right | middle, "locked")
        painter.end()

    def _paint_bar(self, painter: QtGui.QPainter, gradient: QtGui.QImage) -> None:
        bar = self._bar()
        painter.drawImage(bar, gradient)
        painter.setPen(QtGui.QColor(theme.EDGE))
        painter.drawRect(bar.adjusted(0, 0, -1, -1))
        if self._empty:
            return
        low, high = (float(v) for v in self._scale.forward(np.asarray(self.limits, dtype=np.float64)))
        painter.setPen(QtGui.QColor(theme.TEXT))
        metrics = painter.fontMetrics()
        wanted = max(3, min(7, bar.width() // 62))
        # 1-2-5 steps may leave fewer ticks than asked for: ask for more until there are three.
        choices = [self._scale.ticks(self.limits, count) for count in range(wanted, wanted + 5)]
        ticks = next((ticks for ticks in choices if len(ticks) >= 3), choices[-1])
        places = self._scale.forward(np.asarray(ticks, dtype=np.float64))
        free_x = -1.0
        for place, text in zip(places, tick_texts(ticks), strict=True):
            x = round(bar.left() + (float(place) - low) / (high - low) * (bar.width() - 1))
            painter.drawLine(x, bar.bottom() + 1, x, bar.bottom() + 3)
            width = metrics.horizontalAdvance(text)
            left = max(x - width // 2, 0)
            if left > free_x:  # the square-root scale crowds its upper ticks
                painter.drawText(left, bar.bottom() + 4 + metrics.ascent(), text)
                free_x = left + width + 4

    def _paint_wheel(self, painter: QtGui.QPainter) -> None:
        axis = np.linspace(-1, 1, WHEEL_PX)
        row, column = np.meshgrid(axis, axis, indexing="ij")
        pixels = color_wheel(np.where(np.hypot(row, column) <= 1, row, np.nan), column, 1.0)
        image = QtGui.QImage(pixels.data, WHEEL_PX, WHEEL_PX, 4 * WHEEL_PX, QtGui.QImage.Format.Format_RGBA8888)
        painter.drawImage(0, (HEIGHT_PX - WHEEL_PX) // 2, image.copy())
        if not self._empty:
            painter.setPen(QtGui.QColor(theme.TEXT))
            text = QtCore.QRect(WHEEL_PX + 8, 0, self.width() - WHEEL_PX - 8, HEIGHT_PX)
            middle = QtCore.Qt.AlignmentFlag.AlignVCenter
            painter.drawText(text, middle, f"centre 0\nrim {self.limits[1]:.3g}")

    def _bar(self) -> QtCore.QRect:
        room = self.fontMetrics().horizontalAdvance(self.unit or "locked") + 8
        return QtCore.QRect(0, 2, max(self.width() - room, 40), BAR_PX)

    def mousePressEvent(self, event: QtGui.QMouseEvent) -> None:  # noqa: N802
        upper = event.position().x() > self._bar().center().x()
        self._grip = (event.position().x(), upper, self.limits)

    def mouseMoveEvent(self, event: QtGui.QMouseEvent) -> None:  # noqa: N802
        if self._grip is None or self._empty:
            return
        start, upper, (low, high) = self._grip
        moved = (event.position().x() - start) / self._bar().width() * (high - low)
        low, high = (low, max(high + moved, low)) if upper else (min(low + moved, high), high)
        self.dragged.emit(widened(low, high))

    def mouseReleaseEvent(self, event: QtGui.QMouseEvent) -> None:  # noqa: N802
        self._grip = None

    def mouseDoubleClickEvent(self, event: QtGui.QMouseEvent) -> None:  # noqa: N802
        self._grip = None
        self.released.emit()


def tick_texts(ticks: list[float]) -> list[str]:
    """Ticks with as many digits as tell them apart: ``-0.05``, ``0.00``, ``0.05``; powers of ten in the far ranges."""
    if not ticks:
        return []
    largest = max(map(abs, ticks))
    step = min((b - a for a, b in pairwise(ticks)), default=largest or 1.0)
    if largest >= 1e5 or (0 < largest < 1e-3) or (len(ticks) > 1 and step < 1e-3):
        return [_scientific(tick) for tick in ticks]
    if len({round(b - a, 12) for a, b in pairwise(ticks)}) > 1:
        return [f"{tick:g}" for tick in ticks]
    decimals = next((d for d in range(5) if abs(round(step, d) - step) < 1e-9), 4)
    return [f"{0.0 if abs(tick) < 1e-12 else tick:.{decimals}f}".replace("-", "−") for tick in ticks]


def _scientific(value: float) -> str:
    """``3·10⁻⁷``, and ``10⁻⁷`` for a plain power of ten."""
    mantissa, exponent = f"{value:.2e}".split("e")
    digits = mantissa.rstrip("0").rstrip(".").replace("-", "−")
    power = "10" + str(int(exponent)).translate(SUPERSCRIPTS)
    return "0" if value == 0 else power if digits == "1" else f"{digits}·{power}"
