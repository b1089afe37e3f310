"""Training data: annotation files and shards to prepared samples, and samples to batches."""
