"""Ground under all packages: errors, files, processes, tensors in files. Knows nothing of images, codes or training."""
