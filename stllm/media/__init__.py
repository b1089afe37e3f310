"""Media files to frames: opening, decoding, sampling. Knows nothing of models."""
