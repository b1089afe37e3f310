"""Benchmarks: what they ask, how answers are scored, what is written down."""
