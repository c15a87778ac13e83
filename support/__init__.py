"""What keeps a run alive: settings, checkpoints, progress, signals, files, the machine. It knows no formula."""
