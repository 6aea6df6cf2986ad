"""Every architecture of ComfyUI: how to build it, and what its forward is given."""
