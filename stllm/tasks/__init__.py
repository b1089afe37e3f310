"""Tasks: data sets, prompts and model of a configuration, put together for a runner."""
