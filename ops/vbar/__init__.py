"""Device memory that is mapped on demand and can be taken back: the protocol and its implementations."""
