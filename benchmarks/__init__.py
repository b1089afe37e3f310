"""Speed and memory, each measured as a ratio against a stated baseline in one run: `python -m benchmarks.<name>`."""
