"""Media files: decode them, encode them, and notice files that were cut off."""
