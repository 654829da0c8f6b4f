"""Stage one: images to codes and back."""
