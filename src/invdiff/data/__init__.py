"""Captioned images in; latents and prompt embeddings cached on disk; the bundled world."""
