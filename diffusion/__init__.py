"""What came after the slides, and the way from a network to images: networks, denoiser, samplers, model files."""
