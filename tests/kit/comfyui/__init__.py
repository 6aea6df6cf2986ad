"""What the tests that run in ComfyUI share. `start` sets ComfyUI up and is imported before anything else here."""
