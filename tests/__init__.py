"""A package, so that ``python -m tests.bench.edge.day`` means this folder: a library brings ``tests`` as well."""
