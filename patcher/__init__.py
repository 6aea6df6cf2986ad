"""Decides what stays on the device: the policy, the load plan, the dynamic model. Only `comfyui/` imports ComfyUI."""
