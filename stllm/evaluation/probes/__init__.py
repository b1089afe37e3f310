"""`--probe` and `--permute`: a multiple choice asked in other ways, too, to show what its answers depend on.

Each way has lines of its own, which a rerun continues; the benchmark's own lines are the forward view and the first
rotation. Writes `<name>.probe.*` and `<name>.permute.*`: figures (json), tables (md), a chart (png).
"""
