"""Models that lie in several files: shards with an index, and folders as diffusers writes them."""
