"""Between network and image: layers, denoiser, samplers, the sampling loop. No files, no printing."""
