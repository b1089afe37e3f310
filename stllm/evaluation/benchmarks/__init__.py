"""The benchmarks, one file each, with methods load, ask and score. The registry imports every file of this folder."""
