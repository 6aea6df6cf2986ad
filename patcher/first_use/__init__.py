"""The check of a device before its first model: what comes back wrong there is not used there."""
