"""Grading predictions with a language model: what `stllm judge` does."""
