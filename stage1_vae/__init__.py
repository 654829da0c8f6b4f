"""Stage one with continuous latents: likelihood VAEs, from images to latents and back."""
