"""A scale bar that follows the zoom in 1-2-5 steps; hatched ground where nothing was scanned; a veil."""

from __future__ import annotations

import pyqtgraph as pg
from PySide6 import QtCore, QtGui, QtWidgets

from viewer import theme
from viewer.contrast import round_down_125
from viewer.text import length_text

#: A scale bar takes at most this share of the panel's width, and at most so many pixels.
SHARE, LONGEST_PX = 0.28, 180.0
MARGIN_PX, THICK_PX = 8.0, 4.0


def bar_length(visible: float, width_px: float) -> float:
    """Length of the bar, 1, 2, 5 x 10^n [unit of ``visible``], in a view that shows ``visible`` on ``width_px``."""
    return round_down_125(visible * min(SHARE, LONGEST_PX / width_px))


class ScaleBar(pg.GraphicsObject):
    """Lies in the lower left corner of what is visible of an image, in pixels of the screen.

    ``view``: its view box; ``ground``: an item of the view that covers the image.
    """

    def __init__(self, view: pg.ViewBox, ground: QtWidgets.QGraphicsRectItem) -> None:
        super().__init__()
        self._view, self._ground = view, ground
        self.unit = ""
        self.length = 0.0
        """[unit]"""
        self.setParentItem(view)
        self.setZValue(50)
        view.sigRangeChanged.connect(self.refresh)
        view.sigResized.connect(self.refresh)

    def set_unit(self, unit: str) -> None:
        if unit != self.unit:
            self.unit = unit
            self.refresh()

    def refresh(self, *_: object) -> None:
        self.prepareGeometryChange()
        width = self._view.width()
        visible = self._view.viewRect().width()
        self.length = bar_length(visible, width) if width > 0 and visible > 0 else 0.0
        self.update()

    @property
    def text(self) -> str:
        return length_text(self.length, self.unit)

    def boundingRect(self) -> QtCore.QRectF:  # noqa: N802 - Qt's name
        return self._view.boundingRect()

    def paint(self, painter: QtGui.QPainter, *_: object) -> None:
        width, visible = self._view.width(), self._view.viewRect().width()
        if not self.length or not self.unit or visible <= 0:
            return
        font = QtWidgets.QApplication.font()
        font.setBold(True)
        painter.setFont(font)
        length_px = self.length / visible * width
        text_px = QtGui.QFontMetricsF(font).boundingRect(self.text)
        image = self._view.mapRectFromItem(self._ground, self._ground.rect()) & self._view.boundingRect()
        size = QtCore.QSizeF(max(length_px, text_px.width()) + 16, text_px.height() + 18)
        if image.width() < size.width() + 2 * MARGIN_PX or image.height() < size.height() + 2 * MARGIN_PX:
            image = self._view.boundingRect()  # a sliver of an image: the bar would hide it
        corner = image.bottomLeft() + QtCore.QPointF(MARGIN_PX, -MARGIN_PX - size.height())
        ground = QtCore.QRectF(corner, size)
        painter.setRenderHint(QtGui.QPainter.RenderHint.Antialiasing)
        painter.setPen(QtCore.Qt.PenStyle.NoPen)
        # A dark ground, since the image below may be as bright as the bar.
        painter.setBrush(QtGui.QColor(10, 12, 15, 165))
        painter.drawRoundedRect(ground, 4, 4)
        painter.setBrush(QtGui.QColor("white"))
        painter.drawRect(QtCore.QRectF(ground.center().x() - length_px / 2, ground.bottom() - 9, length_px, THICK_PX))
        painter.setPen(QtGui.QColor("white"))
        label = ground.adjusted(0, 3, 0, -11)
        painter.drawText(label, QtCore.Qt.AlignmentFlag.AlignHCenter | QtCore.Qt.AlignmentFlag.AlignTop, self.text)


class Veil(QtWidgets.QGraphicsRectItem):
    """Darkens an image that is no longer live."""

    def __init__(self) -> None:
        super().__init__()
        self.setZValue(10)
        self.setPen(QtGui.QPen(QtCore.Qt.PenStyle.NoPen))
        self.setBrush(QtGui.QColor(15, 17, 20, 150))
        self.setVisible(False)


class EmptyGround(QtWidgets.QGraphicsRectItem):
    """The area of an image before there is an image: dark blue and hatched, so that it is not taken for low values."""

    def __init__(self) -> None:
        super().__init__()
        self.setZValue(-10)

    def paint(self, painter: QtGui.QPainter, *_: object) -> None:
        area = painter.worldTransform().mapRect(self.rect())
        painter.save()
        # In pixels of the screen: a hatch in units of the specimen would grow into bars with the zoom.
        painter.resetTransform()
        painter.fillRect(area, QtGui.QColor(theme.EMPTY))
        painter.fillRect(area, QtGui.QBrush(QtGui.QColor(theme.EMPTY_HATCH), QtCore.Qt.BrushStyle.BDiagPattern))
        painter.restore()
