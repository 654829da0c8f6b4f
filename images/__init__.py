"""Images from wherever they lie: files, sources, batches."""
