"""LoRAs and other patches of ComfyUI as functions of one weight."""
