"""Has ComfyUI's loaders build dynamic models."""
