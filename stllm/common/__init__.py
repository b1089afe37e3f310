"""What every part shares: registry, errors, configuration, device, logging, process ranks."""
