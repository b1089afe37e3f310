"""Diagnostics (probes): a multiple-choice benchmark is asked again with changed frames or options.

`--probe` (temporal.py) changes the frames, `--permute` (permutation.py) the order of the options. A probe is a module
with `TITLE`; `variants`, which returns the benchmark and its variants; `probe_scores`, which compares their records;
`report` and `bars`, which present the scores. Each variant has its own file of records, so that a run can be resumed.
Results are written to `<name>.probe.*` and `<name>.permute.*`: scores (json), a report (md) and a chart (png).
"""
