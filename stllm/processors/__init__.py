"""From what is on disk to what the model reads: pictures to tensors, prompts to token ids."""
