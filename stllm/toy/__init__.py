"""`stllm toy`: a synthetic world with its benchmarks, and what the tiny model learns from it."""
