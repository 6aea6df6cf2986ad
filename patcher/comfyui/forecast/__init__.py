"""Foresees what a model that nobody has loaded yet will take in ComfyUI."""
