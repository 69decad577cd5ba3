"""Measurements behind docs/performance.md: `python -m benchmarks.heads --quick`, then `.report`."""
