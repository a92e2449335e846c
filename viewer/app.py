"""Entry point of the viewer. Qt is imported inside, so that a missing installation becomes a sentence."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from detectors.errors import ConfigurationError, LiveptychoError


def main(address: str, *, screenshot: str | Path | None = None, after_s: float = 3.0, folder: str | Path = ".") -> int:
    """Watch the session that publishes at ``address`` (``tcp://host:port``) until the window is closed.

    ``screenshot``: instead, save the window as PNG there after ``after_s`` [s] and return. ``folder``: where the key S
    saves. Returns the exit status. Raises ``LiveptychoError`` with a sentence for the user: Qt is missing or finds no
    display, or the address cannot be used.
    """
    _need_display(screenshot is not None)
    if os.environ.get("QT_QPA_PLATFORM") == "offscreen":
        # That platform warns about every window that it has no hints for.
        os.environ.setdefault("QT_LOGGING_RULES", "default.warning=false")
    try:
        from PySide6 import QtCore, QtWidgets

        from viewer import theme
        from viewer.controller import Controller
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("PySide6", "shiboken6", "pyqtgraph"):
            raise
        raise ConfigurationError(f"the viewer needs {error.name}: pip install 'liveptycho[viewer]'") from error
    except ImportError as error:  # PySide6 is there, but not the system's libraries below it
        raise ConfigurationError(
            f"the viewer's Qt cannot be loaded ({error}); on Debian and Ubuntu: "
            "apt install libegl1 libgl1 libxkbcommon0 libfontconfig1 libdbus-1-3 libglib2.0-0 fonts-dejavu-core"
        ) from error
    app = QtWidgets.QApplication.instance() or QtWidgets.QApplication(sys.argv[:1])
    assert isinstance(app, QtWidgets.QApplication)
    theme.apply(app)
    controller = Controller(address, Path(folder))
    try:
        controller.window.show()
        failed: list[str] = []
        if screenshot is not None:
            path = Path(screenshot)

            def shoot() -> None:
                if not controller.window.save_picture(path):
                    failed.append(f"cannot write {path}: is its folder there, and does it end in .png?")
                app.quit()

            QtCore.QTimer.singleShot(round(after_s * 1e3), controller, shoot)
        status = app.exec()
        if failed:
            raise LiveptychoError(failed[0])
        return status
    finally:
        controller.close()


def _need_display(offscreen_will_do: bool) -> None:
    """Qt aborts the process where it finds no display; say so before it does."""
    if not sys.platform.startswith("linux") or "QT_QPA_PLATFORM" in os.environ:
        return
    if os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        return
    if not offscreen_will_do:
        raise ConfigurationError(
            "the viewer found no display (neither DISPLAY nor WAYLAND_DISPLAY is set); run it on a machine with a "
            "screen against the session's address, or take a picture with --screenshot FILE.png"
        )
    os.environ["QT_QPA_PLATFORM"] = "offscreen"
