"""Weights on disk: one key table a format, audited loading, conversion, inspection, verification."""
