"""Other ways to debias a diffusion model, a file each, behind `methods.Method`."""
