"""Bodies of encoders and decoders that several autoencoders share."""
