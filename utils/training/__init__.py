"""One training run: trainer, guards, checkpoints, progress, levers, and the cache of trained adapters."""
