"""`serve bench`: base and expanded in turn, under the same texts."""
