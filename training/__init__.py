"""What surrounds the training loop: settings, the executed step, saving, held-out loss, progress."""
