"""`stllm doctor`: checks of data before they are used for training or evaluation."""
