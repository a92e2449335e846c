"""Benchmarks: ours against a baseline, on the same data, in one run. See docs/performance.md."""
