"""Code that the whole package uses: registry, errors, configuration, device, logging, process ranks."""
