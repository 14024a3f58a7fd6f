"""`patch`: write a new checkpoint with new tokens and rows."""
