"""What a run comes to: tables, charts, the paper's table, tests of significance."""
