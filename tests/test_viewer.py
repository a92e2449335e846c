"""The viewer's window, offscreen, against the sockets of a session that is not there."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stream.snapshot import IMAGE_CHANNELS
from tests.viewer_support import images, publisher, responder, snapshot

pytest.importorskip("PySide6.QtWidgets", reason="the viewer's window needs PySide6", exc_type=ImportError)
pytest.importorskip("pyqtgraph", reason="the viewer's window needs pyqtgraph")

from PySide6 import QtCore, QtGui, QtWidgets

from viewer import app as app_module
from viewer import theme
from viewer.channels import SECOND
from viewer.colorbar import tick_texts
from viewer.controller import Controller
from viewer.keys import KEYS
from viewer.model import SILENCE_S, Model
from viewer.scalebar import LONGEST_PX, bar_length
from viewer.window import Window


@pytest.fixture
def clock() -> list[float]:
    return [0.0]


@pytest.fixture
def window(qtbot: Any, qapp: QtWidgets.QApplication, tmp_path: Path, clock: list[float]) -> Window:
    theme.apply(qapp)
    window = Window(Model("tcp://127.0.0.1:1", clock=lambda: clock[0]), tmp_path)
    qtbot.addWidget(window)
    window.show()
    qtbot.waitExposed(window)
    return window


@pytest.fixture
def watch(qtbot: Any, qapp: QtWidgets.QApplication, tmp_path: Path) -> Iterator[Callable[[str], Controller]]:
    theme.apply(qapp)
    controllers: list[Controller] = []

    def start(address: str) -> Controller:
        controllers.append(Controller(address, tmp_path))
        qtbot.addWidget(controllers[-1].window)
        controllers[-1].window.show()
        return controllers[-1]

    yield start
    for controller in controllers:
        controller.close()


def show(window: Window, *args: Any, **changes: Any) -> None:
    if window.model.accept(snapshot(*args, **changes)):
        window.start_afresh()
    window.refresh()


def press(window: Window, key: str, qtbot: Any) -> None:
    """Press a key of the table where the mouse would be: on the phase image."""
    combination = QtGui.QKeySequence(key)[0]
    window.activateWindow()
    qtbot.keyClick(window, combination.key(), combination.keyboardModifiers())


@pytest.mark.parametrize("visible", [1e-3, 0.7, 12.8, 5120.0])
@pytest.mark.parametrize("width_px", [150.0, 640.0, 3000.0])
def test_scale_bar_is_a_round_length_that_fits(visible: float, width_px: float) -> None:
    length = bar_length(visible, width_px)
    assert f"{length:e}"[0] in "125"
    assert length / visible * width_px <= LONGEST_PX + 1e-6
    assert length / visible * width_px > 0.2 * min(0.28 * width_px, LONGEST_PX)


def test_scale_bar_follows_the_zoom(window: Window) -> None:
    show(window, shape=(256, 256), rows=100)
    phase = window.screen_.phase
    whole = phase.scale_bar.text
    assert whole.endswith("nm")
    phase.look_at(QtCore.QRectF(10, 10, 4, 4))
    assert phase.scale_bar.text.endswith("Å")
    assert phase.scale_bar.length < 4


def test_all_panels_show_their_image_circle_and_unit(window: Window) -> None:
    show(window)
    screen = window.screen_
    assert [panel.bar.unit for panel in screen.panels] == ["rad", "counts", "counts/frame", "rad²"]
    assert all(panel.picture.image is not None for panel in screen.panels)
    assert screen.pattern.circle.isVisible()
    assert screen.spectrum.circle.isVisible()
    assert screen.phase.row_line.path().elementAt(0).y == pytest.approx(0.2 * 29.5)
    assert (screen.phase.picture.image[30:, :, 3] == 0).all()
    assert not window.notice.isVisible()


@pytest.mark.parametrize("shape", [(1, 1), (3, 200), (32, 32)])
@pytest.mark.parametrize("known", [True, False])
def test_any_scan_can_be_drawn_with_and_without_calibration(
    window: Window, qtbot: Any, shape: tuple[int, int], known: bool
) -> None:
    optics = ("scan_step_angstrom", "detector_pixel_mrad", "bf_centre_px", "bf_radius_px", "energy_kev")
    show(window, shape=shape, rows=shape[0], **({} if known else dict.fromkeys(optics)))
    for index in range(len(SECOND)):
        window.screen_.set_channel(index)
        window.screen_.second.set_cursor((0, 0))
    window.screen_._show_values()
    assert not window.grab().isNull()
    assert ("Å" in window.screen_.phase.plane_unit) is known


def test_nothing_acquired_and_no_images_leave_the_ground(window: Window) -> None:
    show(window, rows=0, scan_row=None)
    assert window.screen_.phase.picture.image is None
    show(window, 2, images={}, state="waiting", message="waiting for frames")
    assert window.notice.text() == "waiting for frames"
    assert not window.grab().isNull()


def test_crosshair_is_linked_and_reads_values(window: Window) -> None:
    show(window)
    screen = window.screen_
    screen.phase.hovered.emit((5, 7))
    assert screen.second.crosshair_at == (5, 7)
    assert "row 5, col 7  (1.0, 1.4 Å)" in screen.phase.readout.text()
    assert "rad" in screen.phase.readout.text()
    assert "counts" in screen.second.readout.text()
    screen.second.hovered.emit((40, 7))
    assert "not acquired" in screen.phase.readout.text()
    screen.phase.clicked.emit((2, 3))
    screen.phase.hovered.emit(None)
    assert screen.phase.crosshair_at == (2, 3)
    screen.phase.clicked.emit((2, 3))
    screen.phase.hovered.emit(None)
    assert screen.phase.crosshair_at is None


def test_zoom_is_linked(window: Window) -> None:
    show(window)
    window.screen_.phase.view_moved.emit(QtCore.QRectF(2, 2, 3, 3))
    centre = window.screen_.second.box.viewRect().center()
    assert (centre.x(), centre.y()) == pytest.approx((3.5, 3.5))


def test_contrast_lock_stays_through_snapshots_and_ends_with_the_session(window: Window, qtbot: Any) -> None:
    show(window)
    press(window, "C", qtbot)
    before = window.screen_.phase.limits
    brighter = {name: image * 9 for name, image in images(rows=30).items()}
    show(window, 2, images=brighter)
    assert window.screen_.phase.limits == before
    show(window, 3, images=brighter, session="second")
    assert window.screen_.phase.limits != before
    assert not window.screen_.phase.locked


def test_dragging_the_colour_bar_locks_and_a_double_click_unlocks(window: Window, qtbot: Any) -> None:
    show(window)
    panel = window.screen_.phase
    low, high = panel.limits or (0, 0)
    left = QtCore.Qt.MouseButton.LeftButton
    bar = panel.bar._bar()
    start = QtCore.QPoint(bar.right() - 10, bar.center().y())
    qtbot.mousePress(panel.bar, left, pos=start)
    qtbot.mouseMove(panel.bar, start - QtCore.QPoint(60, 0))
    qtbot.mouseRelease(panel.bar, left, pos=start - QtCore.QPoint(60, 0))
    assert panel.locked
    assert panel.limits is not None
    assert panel.limits[0] == low
    assert panel.limits[1] < high
    qtbot.mouseDClick(panel.bar, left, pos=start)
    assert not panel.locked


def test_freeze_stops_drawing_and_says_so(window: Window, qtbot: Any) -> None:
    show(window)
    drawn = window.screen_.phase.images
    press(window, "Space", qtbot)
    assert window.frozen.isVisible()
    show(window, 2)
    assert window.screen_.phase.images is drawn
    press(window, "Space", qtbot)
    assert window.screen_.phase.images is not drawn
    assert not window.frozen.isVisible()


def test_save_writes_picture_and_data(window: Window, qtbot: Any, tmp_path: Path) -> None:
    press(window, "S", qtbot)
    assert "nothing to save" in window.status.currentMessage()
    show(window)
    press(window, "S", qtbot)
    (picture,) = tmp_path.glob("*.png")
    assert QtGui.QImage(str(picture)).width() == window.width()
    assert len(list(tmp_path.glob("*.h5"))) == 1
    window.folder = picture / "below a file"
    press(window, "S", qtbot)
    assert "cannot save" in window.status.currentMessage()


def test_every_key_of_the_table_works(window: Window, qtbot: Any) -> None:
    show(window)
    for key in KEYS:
        if key.action != "quit":
            for one in key.keys:
                press(window, one, qtbot)
    assert window.isVisible()
    window.action_quit()
    assert not window.isVisible()


def test_help_opens_and_lists_every_key(window: Window, qtbot: Any) -> None:
    press(window, "F1", qtbot)
    assert window.help is not None
    assert window.help.isVisible()
    text = window.help.findChild(QtWidgets.QLabel).text()
    assert all(key.text in text for key in KEYS)


def test_second_channel_keeps_its_own_colours(window: Window) -> None:
    show(window)
    for index, channel in enumerate(SECOND):
        window.action_channel(index)
        assert window.screen_.second.unit == channel.unit
        assert window.screen_.channels.currentText() == channel.title
    window.action_next_channel(1)
    assert window.screen_.channel is SECOND[0]


def test_losses_light_up(window: Window) -> None:
    from stream.snapshot import Counters

    show(window, counters=Counters(missing=12))
    assert "12" in window.status.losses["missing"].text()
    assert theme.WARN in window.status.losses["missing"].styleSheet()
    assert theme.WARN not in window.status.losses["late"].styleSheet()
    window.refresh(damaged=3, damage="why")
    assert "3" in window.status.damaged.text()


def test_silence_dims_and_says_who_is_missing(window: Window, clock: list[float]) -> None:
    window.refresh()
    assert "no session at tcp://127.0.0.1:1: waiting" in window.notice.text()
    show(window)
    clock[0] = SILENCE_S + 0.1
    window.refresh()
    assert "no session at tcp://127.0.0.1:1: waiting" in window.notice.text()
    assert window.screen_.phase.veil.isVisible()
    assert window.screen_.phase.picture.image is not None
    assert not window.controls._form.isEnabled()
    show(window, 2)
    assert not window.screen_.phase.veil.isVisible()


def test_fields_follow_the_session_but_not_against_the_user(window: Window, qtbot: Any) -> None:
    show(window, control_port=4000)
    field = window.controls.numbers["C10"]
    assert field.value() == -100
    show(window, 2, control_port=4000, aberrations={"C10": -90.0})
    assert field.value() == -90
    field.lineEdit().selectAll()
    qtbot.keyClicks(field, "-55")
    show(window, 3, control_port=4000, aberrations={"C10": -80.0})
    assert field.lineEdit().text().startswith("-55")
    qtbot.keyClick(field, QtCore.Qt.Key.Key_Escape)
    show(window, 4, control_port=4000, aberrations={"C10": -80.0})
    assert field.value() == -80


def test_reset_asks_first(window: Window, qtbot: Any) -> None:
    show(window, control_port=4000)
    requests: list[str] = []
    window.controls.requested.connect(lambda command, values: requests.append(command))
    left = QtCore.Qt.MouseButton.LeftButton
    qtbot.mouseClick(window.controls.reset, left)
    assert requests == []
    qtbot.mouseClick(window.controls.reset, left)
    assert requests == ["reset"]


def test_a_session_is_watched_controlled_and_survived(
    watch: Callable[[str], Controller], qtbot: Any, tmp_path: Path
) -> None:
    sequence = 0
    with responder() as control:
        with publisher() as (socket, address):
            controller = watch(address)
            window = controller.window

            def received() -> bool:
                nonlocal sequence
                sequence += 1
                socket.send(snapshot(sequence, control_port=control.port).pack())
                return controller.link.received > 0 and controller.control.port == control.port

            qtbot.waitUntil(received, timeout=5000)
            qtbot.waitUntil(lambda: window.screen_.phase.picture.image is not None, timeout=5000)
            window.controls.numbers["C10"].setValue(-55)
            qtbot.waitUntil(lambda: control.serve() or bool(control.requests), timeout=5000)
            assert control.requests[0] == {
                "command": "aberrations",
                "values": {"C10": -55.0, "C12": 0.0, "phi12": 0.0, "C30": 1e5},
            }
            qtbot.waitUntil(lambda: "done" in window.controls.answer.text(), timeout=5000)
            socket.send(b"not a snapshot")
            qtbot.waitUntil(lambda: "damaged snapshots 1" in window.status.damaged.text(), timeout=5000)
        # Another session at the same address, with another scan.
        with publisher(address) as (socket, _):

            def second() -> bool:
                socket.send(snapshot(1, session="second", shape=(16, 20), rows=4).pack())
                plane = window.screen_.phase.plane
                return plane is not None and plane.shape == (16, 20)

            qtbot.waitUntil(second, timeout=8000)
            visible = window.screen_.phase.box.viewRect()
            assert visible.contains(QtCore.QRectF(0, 0, 20 * 0.2 - 0.2, 16 * 0.2 - 0.2))
            assert visible.width() < 3 * 20 * 0.2


def test_ticks_are_told_apart() -> None:
    assert tick_texts([-0.1, 0.0, 0.1]) == ["−0.1", "0.0", "0.1"]
    assert tick_texts([5100.0, 5200.0]) == ["5100", "5200"]
    assert tick_texts([1e-7, 1e-6]) == ["10⁻⁷", "10⁻⁶"]
    assert tick_texts([0.0, 2.5e-7]) == ["0", "2.5·10⁻⁷"]
    assert tick_texts([0.01, 0.1, 1.0]) == ["0.01", "0.1", "1"]
    assert tick_texts([]) == []


def test_a_missing_qt_is_a_sentence() -> None:
    code = (
        "import sys; sys.modules['PySide6'] = None\n"
        "from viewer.__main__ import run\n"
        "sys.argv = ['viewer', 'tcp://127.0.0.1:1', '--screenshot', 'x.png']\n"
        "sys.exit(run())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.strip() == "liveptycho: the viewer needs PySide6: pip install 'liveptycho[viewer]'"


def test_no_display_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("QT_QPA_PLATFORM", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    with pytest.raises(app_module.ConfigurationError, match="no display"):
        app_module.main("tcp://127.0.0.1:1")


def test_screenshot_from_the_command_line(tmp_path: Path) -> None:
    picture = tmp_path / "view.png"
    command = [sys.executable, "-m", "viewer", "tcp://127.0.0.1:1", "--screenshot", str(picture), "--after-s", "0.2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    image = QtGui.QImage(str(picture))
    assert (image.width(), image.height()) == (1400, 900)
    assert np.unique(np.array([image.pixel(x, 450) for x in range(0, 1400, 7)])).size > 3


def without(*channels: str, **changes: Any) -> dict[str, Any]:
    """What a snapshot of a session is made of that leaves out these channels."""
    gone = {image for channel in channels for image in IMAGE_CHANNELS[channel]}
    return {
        "left_out": channels,
        "images": {name: image for name, image in images(rows=30).items() if name not in gone},
        **changes,
    }


def test_left_out_images_are_said_in_their_places(window: Window) -> None:
    screen = window.screen_
    show(window, **without("df", "com", "pattern"))
    assert screen.phase.absence.text() == screen.second.absence.text() == ""
    assert screen.channel.name == "bright_field"
    assert screen.pattern.absence.text() == "left out (--channels phase,bf)"
    assert screen.pattern.picture.image is None
    assert not screen.pattern.bar.isVisible()
    assert not screen.pattern.circle.isVisible()
    assert screen.pattern.readout.text() == ""
    assert window.summary.values["Images"].text() == "left out: df, com, pattern (--channels phase,bf)"
    assert window.summary.values["Images"].isVisible()
    enabled = [screen.channels.model().flags(screen.channels.model().index(i, 0)) for i in range(len(SECOND))]
    offered = [SECOND[i].name for i, flags in enumerate(enabled) if flags & QtCore.Qt.ItemFlag.ItemIsEnabled]
    assert offered == ["bright_field", "amplitude"]
    assert window.controls.numbers["C10"].isEnabledTo(window.controls._form)


def test_a_key_for_a_left_out_image_says_so_and_steps_pass_it_over(window: Window, qtbot: Any) -> None:
    screen = window.screen_
    show(window, **without("df", "com", "pattern"))
    press(window, "2", qtbot)
    assert screen.channel.name == "dark_field"
    assert screen.second.absence.text() == "left out (--channels phase,bf)"
    press(window, "]", qtbot)
    assert screen.channel.name == "amplitude"
    assert screen.second.absence.text() == ""
    press(window, "]", qtbot)
    assert screen.channel.name == "bright_field"


@pytest.mark.parametrize(
    ("channels", "first", "second"),
    [
        (("bf", "df", "com"), "Bright field", "dark_field"),
        (("com",), "CoM row", "com_column"),
        (("bf",), "Bright field", "dark_field"),
        (("pattern",), "Phase", "bright_field"),
    ],
)
def test_without_the_phase_the_first_image_takes_its_place(
    window: Window, channels: tuple[str, ...], first: str, second: str
) -> None:
    screen = window.screen_
    gone = tuple(name for name in IMAGE_CHANNELS if name not in channels)
    show(window, **without(*gone))
    assert (screen.first.title, screen.channel.name) == (first, second)
    assert screen._first_title.text() == first
    assert screen._spectrum_title.text() == f"{first} spectrum"
    there = channels != ("pattern",)
    for panel in (screen.phase, screen.spectrum):
        assert (panel.picture.image is not None) is there
        assert bool(panel.absence.text()) is not there
    if there:
        assert screen.spectrum.bar.unit == f"{screen.first.unit}²"
    for index in range(len(SECOND)):
        screen.set_channel(index)
        screen.second.set_cursor((0, 0))
        screen.step_channel(1)
    screen._show_values()
    assert not window.grab().isNull()
    assert not window.controls.numbers["C10"].isEnabledTo(window.controls._form), "it would change nothing"
    assert window.controls.rotation.isEnabledTo(window.controls._form), "it turns the centre of mass"


def test_the_next_session_may_make_everything_again(window: Window) -> None:
    screen = window.screen_
    show(window, **without("phase", "pattern"))
    show(window, 1, session="second")
    assert screen.first.title == screen._first_title.text() == "Phase"
    assert [panel.bar.unit for panel in screen.panels] == ["rad", "counts", "counts/frame", "rad²"]
    assert not any(panel.absence.text() for panel in screen.panels)
    assert all(panel.bar.isVisible() for panel in screen.panels)
    assert screen.pattern.circle.isVisible()
    assert not window.summary.values["Images"].isVisible()
    assert window.controls.numbers["C10"].isEnabledTo(window.controls._form)


def test_an_unknown_channel_that_is_left_out_is_only_named(window: Window) -> None:
    show(window, left_out=("haadf",))
    assert window.summary.values["Images"].text() == "left out: haadf (--channels phase,bf,df,com,pattern)"
    assert not any(panel.absence.text() for panel in window.screen_.panels)
