"""The ground that everything stands on: printing, files, the machine, signals, a lock. Knows nothing of diffusion."""
