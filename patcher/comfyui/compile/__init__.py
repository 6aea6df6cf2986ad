"""torch.compile for ComfyUI's models."""
