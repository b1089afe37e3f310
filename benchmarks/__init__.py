"""Measurements of speed and memory, `python -m benchmarks.<name>`. Each compares ours with a baseline."""
