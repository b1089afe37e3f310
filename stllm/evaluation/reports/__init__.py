"""Reports on evaluation runs: tables, charts, the paper's table, comparison of two runs."""
