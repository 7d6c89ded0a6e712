"""cheapscale: train a diffusion model once, small; buy resolution and speed afterwards."""
