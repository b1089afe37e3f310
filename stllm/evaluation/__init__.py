"""Benchmarks: their questions, the scoring of answers, and the result files."""
