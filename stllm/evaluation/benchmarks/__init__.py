"""The benchmarks: a file each, with load, ask and score; stllm/common/registry.py lists the files."""
