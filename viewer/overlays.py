"""Marks on images: circles, the row being scanned, the crosshair. Lines keep their width whatever the zoom."""

from __future__ import annotations

from PySide6 import QtCore, QtGui, QtWidgets

from viewer import theme


def line_pen(color: str, width_px: float = 1.5, style: QtCore.Qt.PenStyle = QtCore.Qt.PenStyle.SolidLine) -> QtGui.QPen:
    """A pen ``width_px`` wide on the screen."""
    pen = QtGui.QPen(QtGui.QColor(color), width_px, style)
    pen.setCosmetic(True)
    return pen


class _Mark(QtWidgets.QGraphicsPathItem):
    """A path drawn twice, dark and wide below its colour: it stays visible on black and on white."""

    def __init__(self, pen: QtGui.QPen) -> None:
        super().__init__()
        self.setZValue(20)
        self.setPen(pen)
        self.setVisible(False)

    def paint(self, painter: QtGui.QPainter, *_: object) -> None:
        shade = line_pen("#000000", self.pen().widthF() + 2)
        shade.setColor(QtGui.QColor(0, 0, 0, 130))
        painter.setRenderHint(QtGui.QPainter.RenderHint.Antialiasing)
        painter.setBrush(QtCore.Qt.BrushStyle.NoBrush)
        for pen in (shade, self.pen()):
            painter.setPen(pen)
            painter.drawPath(self.path())


class Circle(_Mark):
    """A circle around the origin."""

    def __init__(self) -> None:
        super().__init__(line_pen(theme.MARK))
        self._radius: tuple[float, float] | None = None

    def set_radius(self, radius: tuple[float, float] | None) -> None:
        """(row, column) radius [unit of the view]; None hides it."""
        if radius == self._radius:
            return
        self._radius = radius
        path = QtGui.QPainterPath()
        if radius is not None:
            path.addEllipse(QtCore.QPointF(0, 0), radius[1], radius[0])
        self.setPath(path)
        self.setVisible(radius is not None)


class RowLine(_Mark):
    """The line below which the scan goes on."""

    def __init__(self) -> None:
        super().__init__(line_pen(theme.MARK))

    def set_row(self, y: float | None, left: float = 0.0, right: float = 0.0) -> None:
        """Across the image at ``y`` [unit of the view]; None hides it."""
        path = QtGui.QPainterPath()
        if y is not None:
            path.moveTo(left, y)
            path.lineTo(right, y)
        self.setPath(path)
        self.setVisible(y is not None)


class Crosshair(_Mark):
    """Two lines through one pixel, from edge to edge of the image."""

    def __init__(self) -> None:
        super().__init__(line_pen("#ffd166", 1.0, QtCore.Qt.PenStyle.DashLine))

    def set_point(self, point: tuple[float, float] | None, rect: tuple[float, float, float, float]) -> None:
        """(x, y) and the image's (x, y, width, height) [unit of the view]; a point None hides it."""
        path = QtGui.QPainterPath()
        if point is not None:
            x, y = point
            left, top, width, height = rect
            path.moveTo(left, y)
            path.lineTo(left + width, y)
            path.moveTo(x, top)
            path.lineTo(x, top + height)
        self.setPath(path)
        self.setVisible(point is not None)
