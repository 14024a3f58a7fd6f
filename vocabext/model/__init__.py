"""The frozen model, what its architecture calls things, and what it would write at a place."""
