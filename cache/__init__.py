"""Who remembers: memory accounting. Never imports ComfyUI."""
