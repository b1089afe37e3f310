"""How it is learned: the training loop, on transformers' Trainer and accelerate."""
