"""One image with its title, value read-out, scale bar, colour bar and marks. Knows arrays and planes, not snapshots."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyqtgraph as pg
from PySide6 import QtCore, QtGui, QtWidgets

from viewer import render, theme
from viewer.colorbar import ColorBar
from viewer.contrast import Contrast, Limits, LinearScale, LockedContrast, PeakContrast, RobustContrast, Scale
from viewer.geometry import PIXELS, Plane
from viewer.labels import ElidedLabel
from viewer.overlays import Circle, Crosshair, RowLine
from viewer.scalebar import EmptyGround, ScaleBar, Veil

#: Pixels drawn smaller than this many screen pixels are interpolated: skipping some would make moiré of a lattice.
CRISP_FROM = 2.5
#: Interpolation looks at two neighbours: below this many screen pixels a pixel, whole areas are averaged instead.
AVERAGE_BELOW = 0.6

LINEAR = LinearScale()

#: Titles are as high as a channel's selector, so that the images beside it line up.
HEADER_PX = 26


class _Picture(pg.ImageItem):
    """An RGBA image, uint8 (rows, columns, 4): large pixels stay crisp, small ones are interpolated or averaged."""

    smooth = False

    def paint(self, painter: QtGui.QPainter, *rest: Any) -> None:
        turned = painter.worldTransform()
        width_px, height_px = abs(turned.m11()), abs(turned.m22())
        painter.setRenderHint(QtGui.QPainter.RenderHint.SmoothPixmapTransform, self.smooth or width_px < CRISP_FROM)
        if self.image is None or min(width_px, height_px) > AVERAGE_BELOW:
            super().paint(painter, *rest)
            return
        rows, columns = self.image.shape[:2]
        whole = QtGui.QImage(self.image.data, columns, rows, 4 * columns, QtGui.QImage.Format.Format_RGBA8888)
        size = QtCore.QSize(max(round(columns * width_px), 1), max(round(rows * height_px), 1))
        mode = QtCore.Qt.TransformationMode.SmoothTransformation
        averaged = whole.scaled(size, QtCore.Qt.AspectRatioMode.IgnoreAspectRatio, mode)
        painter.drawImage(QtCore.QRectF(0, 0, columns, rows), averaged)


class ImagePanel(QtWidgets.QFrame):
    """Shows a scalar image, or a vector field as colour.

    ``contrast`` is the automatic policy to which unlocking returns; ``colors`` one of theme.COLOR_MAPS.
    """

    hovered = QtCore.Signal(object)
    """(row, column) under the mouse, None once it has left the image"""
    clicked = QtCore.Signal(object)
    """(row, column) of a click"""
    view_moved = QtCore.Signal(object)
    """the user panned or zoomed: QRectF [unit of the plane]"""

    def __init__(self, title: QtWidgets.QWidget, contrast: Contrast, colors: str, scale: Scale = LINEAR) -> None:
        super().__init__()
        self.setObjectName("panel")
        self.automatic: Contrast = contrast
        self.contrast: Contrast = contrast
        self.scale: Scale = scale
        self.colors = colors
        self.unit = ""
        self.plane: Plane | None = None
        self.images: tuple[np.ndarray, ...] | None = None
        self.limits: Limits | None = None
        self.crosshair_at: tuple[int, int] | None = None
        self._home: QtCore.QRectF | None = None
        self._table = render.lookup(theme.colors(colors))

        self.canvas = pg.GraphicsView(background=theme.CANVAS)
        self.canvas.setMinimumSize(120, 120)
        self.canvas.setFrameShape(QtWidgets.QFrame.Shape.NoFrame)
        self.box = pg.ViewBox(lockAspect=True, invertY=True, enableMenu=False, defaultPadding=0.015)
        self.canvas.setCentralItem(self.box)
        self.picture = _Picture()
        self.ground, self.veil = EmptyGround(), Veil()
        self.circle, self.row_line, self.crosshair = Circle(), RowLine(), Crosshair()
        for item in (self.ground, self.picture, self.veil, self.circle, self.row_line, self.crosshair):
            self.box.addItem(item, ignoreBounds=True)
        self.scale_bar = ScaleBar(self.box, self.ground)
        self.bar = ColorBar()
        self.bar.set_colors(theme.colors(colors))
        self.readout = ElidedLabel()
        self.readout.setObjectName("readout")
        self.readout.setAlignment(QtCore.Qt.AlignmentFlag.AlignRight | QtCore.Qt.AlignmentFlag.AlignVCenter)
        self.absence = QtWidgets.QLabel()
        self._arrange(title)

        self.bar.dragged.connect(self._lock_at)
        self.bar.released.connect(self.unlock)
        self.box.sigRangeChangedManually.connect(self._report_move)
        self.canvas.scene().sigMouseMoved.connect(self._report_hover)
        self.canvas.scene().sigMouseClicked.connect(self._report_click)

    def _arrange(self, title: QtWidgets.QWidget) -> None:
        header = QtWidgets.QHBoxLayout()
        title.setFixedHeight(HEADER_PX)
        header.addWidget(title)
        header.addWidget(self.readout, 1)
        layout = QtWidgets.QVBoxLayout(self)
        layout.setContentsMargins(8, 6, 8, 4)
        layout.setSpacing(4)
        layout.addLayout(header)
        layout.addWidget(self.canvas, 1)
        layout.addWidget(self.bar)
        self.absence.setObjectName("quiet")
        self.absence.setTextFormat(QtCore.Qt.TextFormat.PlainText)
        self.absence.setAttribute(QtCore.Qt.WidgetAttribute.WA_TransparentForMouseEvents)
        self.absence.setAlignment(QtCore.Qt.AlignmentFlag.AlignCenter)
        self.absence.setWordWrap(True)
        QtWidgets.QVBoxLayout(self.canvas).addWidget(self.absence)

    def say_absent(self, text: str) -> None:
        """Why there is no image and none will come, in the middle of the panel; empty where one may."""
        if text != self.absence.text():
            self.absence.setText(text)
            self.scale_bar.setVisible(not text)
            self.bar.setVisible(not text)

    def show_image(self, images: tuple[np.ndarray, ...] | None, plane: Plane | None, unit: str) -> None:
        """Draw one float image (rows, columns) or a vector's two components [unit]; None leaves the ground."""
        self.images, self.unit = images, unit
        if plane is not None and plane != self.plane:
            x, y, width, height = plane.rect
            for item in (self.picture, self.ground, self.veil):
                item.setRect(QtCore.QRectF(x, y, width, height))
            self.scale_bar.set_unit(plane.unit)
            self.plane = plane
            self.set_cursor(self.crosshair_at)
        self.redraw()

    def redraw(self) -> None:
        """Colour the images again, after a change of contrast, scale or map."""
        limits = None
        if self.images is not None:
            limits = self.contrast.limits(self.images[0] if len(self.images) == 1 else render.magnitude(*self.images))
        if limits is None or self.images is None or self.plane is None:
            self.limits = None
            self.picture.clear()
        else:
            self.limits = limits = self.scale.clip(limits)
            if len(self.images) == 1:
                pixels = render.colored(self.images[0], limits, self.scale, self._table)
            else:
                pixels = render.color_wheel(self.images[0], self.images[1], limits[1])
            fresh = self.picture.image is None or self.picture.image.shape != pixels.shape
            self.picture.setImage(pixels, autoLevels=False)
            if fresh:
                self.picture.setRect(QtCore.QRectF(*self.plane.rect))
        self.bar.show_limits(self.limits, self.unit, self.scale, self.locked)

    # Contrast and colours

    @property
    def locked(self) -> bool:
        return isinstance(self.contrast, LockedContrast)

    def set_contrast(self, contrast: Contrast) -> None:
        """A new automatic policy; ends a lock, whose limits belonged to what was shown before."""
        self.automatic = self.contrast = contrast

    def lock(self) -> None:
        """Keep the limits of now, where there are any."""
        if self.limits is not None:
            self.contrast = LockedContrast(self.limits)
            self.redraw()

    def unlock(self) -> None:
        self.contrast = self.automatic
        self.redraw()

    def _lock_at(self, limits: Limits) -> None:
        self.contrast = LockedContrast(limits)
        self.redraw()

    def set_colors(self, colors: str | None) -> None:
        """One of theme.COLOR_MAPS; None for the colour wheel of a vector field."""
        if colors is not None:
            self.colors = colors
            self._table = render.lookup(theme.colors(colors))
        self.bar.set_colors(None if colors is None else theme.colors(colors))

    def set_dimmed(self, dimmed: bool) -> None:
        self.veil.setVisible(dimmed)

    def set_smooth(self, smooth: bool) -> None:
        self.picture.smooth = smooth
        self.picture.update()

    # View and cursor

    def set_home(self, home: QtCore.QRectF | None) -> None:
        """What :meth:`fit` shows [unit of the plane]; None for the whole image."""
        self._home = home

    def fit(self) -> None:
        rect = self._home or (QtCore.QRectF(*self.plane.rect) if self.plane else QtCore.QRectF(0, 0, 1, 1))
        self.box.setRange(rect, padding=0.015)

    def look_at(self, rect: QtCore.QRectF) -> None:
        """Show ``rect`` [unit of the plane], without reporting it as the user's doing."""
        self.box.setRange(rect, padding=0)

    def set_cursor(self, cursor: tuple[int, int] | None) -> None:
        """Crosshair at (row, column)."""
        self.crosshair_at = cursor
        if self.plane is not None:
            self.crosshair.set_point(None if cursor is None else self.plane.point(*cursor), self.plane.rect)

    def values(self) -> tuple[float, ...] | None:
        """The images' values under the crosshair [unit]; None without image or crosshair."""
        if self.crosshair_at is None or self.images is None:
            return None
        row, column = self.crosshair_at
        inside = all(row < image.shape[0] and column < image.shape[1] for image in self.images)
        return tuple(float(image[row, column]) for image in self.images) if inside else None

    @property
    def plane_unit(self) -> str:
        return self.plane.unit if self.plane else PIXELS

    def _pixel_at(self, scene_point: QtCore.QPointF) -> tuple[int, int] | None:
        if self.plane is None or not self.box.sceneBoundingRect().contains(scene_point):
            return None
        point = self.box.mapSceneToView(scene_point)
        return self.plane.pixel(point.x(), point.y())

    def _report_hover(self, scene_point: QtCore.QPointF) -> None:
        self.hovered.emit(self._pixel_at(scene_point))

    def _report_click(self, event: Any) -> None:
        if event.double():
            self.fit()
            self._report_move()
        elif (pixel := self._pixel_at(event.scenePos())) is not None:
            self.clicked.emit(pixel)

    def _report_move(self, *_: object) -> None:
        self.view_moved.emit(self.box.viewRect())

    def leaveEvent(self, event: QtCore.QEvent) -> None:  # noqa: N802
        self.hovered.emit(None)
        super().leaveEvent(event)


#: Spectra span decades, and most of their pixels are noise: show the noise dark and the peaks bright.
SPECTRUM_CONTRAST = PeakContrast()
#: The disk covers a tenth of a pattern: percentiles near the ends keep disk and dark field both on the scale.
PATTERN_CONTRAST = RobustContrast(1, 99.8)
