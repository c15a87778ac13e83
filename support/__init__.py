"""The foundations: printing, files, the machine, signals, a lock. Nothing here is about diffusion."""
