"""Scripts in environments of their own: started, asked, and ended with everything that they started."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent
_ROOT = _HERE.parents[1]

#: The environments that the Makefile makes, and what must be importable in each.
ENVIRONMENTS = {"libertem": "libertem_live, ptychography40", "py4dstem": "py4DSTEM"}


class PeerFailed(RuntimeError):
    """A peer's process failed, took too long, or is not installed; the text says which."""


def problem_with(environment: str) -> str:
    """Why an environment cannot be used, in a sentence; empty when it can."""
    python = _python(environment)
    if not python.exists():
        return "not installed: `make bench-peers` does it, and needs a package index"
    done = subprocess.run(
        [python, "-c", f"import {ENVIRONMENTS[environment]}"],
        capture_output=True,
        text=True,
        env=_environ(),
        timeout=120,
    )
    if done.returncode:
        return (
            f"cannot be used on this Python, or is incomplete ({_last_line(done.stderr)}); remove "
            f".peers/{environment} and see what `make bench-peers` says"
        )
    return ""


class Script:
    """A script at work; see :func:`running`."""

    def __init__(self, script: str, environment: str | None, asked: dict[str, Any], said: Any, log: Any) -> None:
        self._name, self._said, self._log = script, said, log
        if environment is None:
            command = [sys.executable, "-m", f"benchmarks.peers.{script}"]
        else:
            command = [str(_python(environment)), str(_HERE / f"{script}.py")]
        self._process = subprocess.Popen(
            [*command, json.dumps(asked)],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=log,
            cwd=_ROOT,
            env=_environ(),
            start_new_session=True,
        )

    def answer(self, timeout_s: float) -> dict[str, Any]:
        """The first line of JSON that it says; it may go on working. Raises ``PeerFailed``."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            ended = self._process.poll()
            self._said.seek(0)
            for line in self._said.read().splitlines(keepends=True):
                if line.startswith("{") and line.endswith("\n"):
                    return json.loads(line)
            if ended is not None:
                self._log.seek(0)
                how = f"was killed by signal {-ended}" if ended < 0 else "ended"
                raise PeerFailed(f"{self._name} {how}: {_last_line(self._log.read())}")
            time.sleep(0.05)
        raise PeerFailed(f"{self._name} took more than {timeout_s:.0f} s")

    def kill(self) -> None:
        """End it with its children, and theirs."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@contextlib.contextmanager
def running(script: str, environment: str | None, **asked: Any) -> Iterator[Script]:
    """Start a script of this folder, in a session of its own; leaving kills all of the session.

    ``environment``: None for ours.
    """
    # Files, not pipes: nobody reads while it works, and it must not wait for that.
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as log:
        started = Script(script, environment, asked, said, log)
        try:
            yield started
        finally:
            started.kill()


def ask(script: str, environment: str | None, timeout_s: float, **asked: Any) -> dict[str, Any]:
    """Run a script and return its answer. Raises ``PeerFailed``."""
    with running(script, environment, **asked) as started:
        return started.answer(timeout_s)


def _python(environment: str) -> Path:
    return _ROOT / ".peers" / environment / "bin" / "python"


def _environ() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1][:200] if lines else "it said nothing"
