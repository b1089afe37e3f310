"""The benchmarks: a file each, with load, ask and score. The registry imports every file of this folder."""
