"""Benchmarks: ours against a baseline, on the same data, in one run. ``python -m benchmarks``; see docs/performance.md."""
