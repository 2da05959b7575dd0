"""`moellava demo`: the whole line on real images, for a machine without any hub."""
