"""The training loop, on transformers' Trainer and accelerate, and the extraction of features."""
