"""Lists the packages of the mapped top-level folders; everything else stands in pyproject.toml."""

from setuptools import find_packages, setup

MAPPED = ("edge", "proto", "data", "distill", "cloud")

packages = ["isthmus", *(f"isthmus.{name}" for name in find_packages("isthmus"))]
for folder in MAPPED:
    packages.append(f"isthmus.{folder}")
    packages.extend(f"isthmus.{folder}.{name}" for name in find_packages(folder))

setup(packages=packages)
