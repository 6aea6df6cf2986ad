"""ComfyUI's side of the patcher: with nodes/ and cache/comfyui the only place that imports ComfyUI."""
