"""Weights on disk: known formats, loading with an audit, conversion, inspection and verification."""
