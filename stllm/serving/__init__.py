"""`stllm serve`: OpenAI-compatible chat completions about videos and images. The web page shares its queue."""
