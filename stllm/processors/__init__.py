"""Preparation of the model's input: frames to tensors, prompts to token ids, padding and packing."""
