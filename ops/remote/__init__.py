"""Files that lie elsewhere: probed by their header, and used while they come."""
