"""Tar shards, local or remote: where they are, the index of a tar, and reading samples and clips."""
