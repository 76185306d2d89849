"""Everything that knows a denoiser, or another network that we did not make."""
