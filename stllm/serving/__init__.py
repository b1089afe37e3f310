"""`stllm serve`: OpenAI-compatible chat completions about videos and images, on the one engine."""
