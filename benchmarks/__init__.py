"""Ours, the peers and the limit, side by side in one launch: `python -m benchmarks`, results in RESULTS.md."""
