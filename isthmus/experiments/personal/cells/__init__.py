"""One student measured is a cell: methods, both halves of it, measurements, the pool that runs cells."""
