"""What every trainer uses: options, hardware, optimizers, checkpoints, evaluation, trackers."""
