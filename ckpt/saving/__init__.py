"""What runs inside a training: a saver whose checkpoints are whole or absent."""
