"""A package, so that ``python -m tests.bench.<name>`` means this folder: some library brings a ``tests`` as well."""
