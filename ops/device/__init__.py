"""The backends of devices, and the answers to a device that fails."""
