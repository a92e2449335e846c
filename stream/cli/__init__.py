"""The command line: ``liveptycho COMMAND``. Built on nothing but the Python API.

options       settings as flags, shared by the commands
live          live, record, view, check
files         reconstruct, replay, info
simulated     simulate, demo
progress      bars with rate and remaining time
"""

from stream.cli.app import main

__all__ = ["main"]
