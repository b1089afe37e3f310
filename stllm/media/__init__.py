"""Turns media files into frames: opening, decoding and sampling. This package does not depend on the model."""
