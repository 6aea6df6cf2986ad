"""A store of outputs that several machines share."""
