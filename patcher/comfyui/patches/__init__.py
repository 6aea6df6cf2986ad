"""Makes functions of one weight of LoRAs and ComfyUI's other patches."""
