"""Networks between images and latents."""
