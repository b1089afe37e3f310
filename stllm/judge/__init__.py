"""Scoring of predictions by a language model, the judge (`stllm judge`)."""
