"""Labels: titles, and texts that are cut with an ellipsis where there is no room, never widening their panel."""

from __future__ import annotations

from PySide6 import QtCore, QtGui, QtWidgets


def title_label(text: str) -> QtWidgets.QLabel:
    """A panel's title."""
    label = QtWidgets.QLabel(text)
    label.setObjectName("title")
    return label


class ElidedLabel(QtWidgets.QLabel):
    """A plain text that takes what room there is; the whole of it is in the tool tip."""

    def __init__(self, text: str = "") -> None:
        super().__init__(text)
        # What comes from the network is text, whatever it looks like.
        self.setTextFormat(QtCore.Qt.TextFormat.PlainText)
        self.setSizePolicy(QtWidgets.QSizePolicy.Policy.Ignored, QtWidgets.QSizePolicy.Policy.Preferred)

    def paintEvent(self, event: QtGui.QPaintEvent) -> None:  # noqa: N802
        painter = QtGui.QPainter(self)
        area = self.contentsRect()
        text = self.fontMetrics().elidedText(self.text(), QtCore.Qt.TextElideMode.ElideRight, area.width())
        painter.setPen(self.palette().color(self.foregroundRole()))
        painter.drawText(area, self.alignment().value, text)
        painter.end()

    def event(self, event: QtCore.QEvent) -> bool:
        if event.type() == QtCore.QEvent.Type.ToolTip:
            self.setToolTip(self.text())
        return super().event(event)
