"""`stllm toy`: a synthetic world with benchmarks, on which the tiny model is trained."""
