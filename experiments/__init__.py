"""Experiments that measure how good answers are. `benchmarks` measures speed and memory."""
