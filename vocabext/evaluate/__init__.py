"""`eval`: measure reading and writing on held-out text."""
