"""`stllm doctor`: checks data before a training or an evaluation uses it."""
