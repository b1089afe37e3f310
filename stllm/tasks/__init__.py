"""Training tasks. A task builds data sets, prompts and model from a configuration; a runner trains them."""
