"""Who decides: the policy, the load plan, the dynamic model. Only the comfy_*.py files import ComfyUI."""
