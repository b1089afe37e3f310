"""Experiments that measure answers; speed and memory are measured in `benchmarks`."""
