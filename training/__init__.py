"""What both stages share to train: loop, checkpoints, model folders. Knows nothing of images or codes."""
