"""Command lines of training: train and prepare."""
