"""``python -m benchmarks.peers [--quick | --long]``: this section alone, not kept."""

from __future__ import annotations

import argparse

from benchmarks.peers import run

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="one small scan")
    size.add_argument(
        "--long", action="store_true", help="the 256x256 scans too: a quarter of an hour, 10 GB of memory"
    )
    options = parser.parse_args()
    print(run(options.quick, options.long).text)
