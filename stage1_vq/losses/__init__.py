"""What a good reconstruction is."""
