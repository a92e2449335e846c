"""``python -m viewer ADDRESS``"""

from __future__ import annotations

import argparse
import logging
import signal
import sys

from detectors.errors import LiveptychoError
from viewer.app import main


def run() -> int:
    """Parse the command line and watch; errors become one sentence on stderr and exit status 2."""
    parser = argparse.ArgumentParser(prog="python -m viewer", description="Watch a liveptycho session.")
    parser.add_argument("address", help="where the session publishes, e.g. tcp://127.0.0.1:31010")
    parser.add_argument("--screenshot", metavar="FILE.png", help="save a picture of the window there, and end")
    parser.add_argument("--after-s", metavar="S", type=float, default=3.0, help="seconds before the picture (3)")
    parser.add_argument("--folder", default=".", help="where the key S saves (the current folder)")
    arguments = parser.parse_args()
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    # Python never sees Ctrl-C while Qt's loop runs: let the terminal end the process as usual.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        return main(
            arguments.address,
            screenshot=arguments.screenshot,
            after_s=arguments.after_s,
            folder=arguments.folder,
        )
    except LiveptychoError as error:
        sys.stderr.write(f"liveptycho: {error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(run())
