"""Files: written atomically, linked, copied, compared, read in ranges."""
