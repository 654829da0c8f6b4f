"""How good models and images are: figures of test images, of samples against a reference, and the protocol they are
part of."""
