"""What a device can do, and what is done when it fails."""
