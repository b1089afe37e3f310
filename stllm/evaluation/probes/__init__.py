"""Probes: a multiple choice asked in other ways, too, to show what its answers depend on (`--probe`, `--permute`).

A probe is a module with `TITLE`; `variants`, which gives the benchmark itself and variants with changed items;
`probe_scores`, which compares their lines; `report` and `bars`, which show the scores. Each variant has its own lines,
which a rerun continues. `<name>.probe.*` and `<name>.permute.*` are figures (json), tables (md) and a chart (png).
"""
