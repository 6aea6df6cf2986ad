"""ComfyUI's loaders, building dynamic models."""
