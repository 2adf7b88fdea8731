"""Lists the packages of the mapped folders and makes the source archive reproducible. The rest is in pyproject.toml."""

import gzip
import os
import tarfile
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.sdist import sdist

MAPPED = ("edge", "proto", "data", "distill", "cloud")


class ReproducibleSdist(sdist):
    """Writes the same bytes for the same files, on every machine and at every time.

    setuptools puts the build's time, the owner and the file modes of the checkout into the archive. Here every member
    has the time in SOURCE_DATE_EPOCH (default: 1980-01-01, the oldest time that a wheel can hold), no owner, and
    mode 0644 or 0755. Only .tar.gz is made; raises ValueError for another format.
    """

    def make_archive(self, base_name, format, root_dir=None, base_dir=None, owner=None, group=None):
        if format != "gztar":
            raise ValueError(f"the source archive is a .tar.gz: --formats={format} is not supported")
        epoch_s = int(os.environ.get("SOURCE_DATE_EPOCH", "315532800"))
        archive = Path(f"{base_name}.tar.gz")
        archive.parent.mkdir(parents=True, exist_ok=True)

        def without_origin(member):
            member.mtime = epoch_s
            member.uid = member.gid = 0
            member.uname = member.gname = ""
            member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            return member

        # "add" walks folders in sorted order. The empty name keeps the archive's own path out of the gzip header.
        with (
            archive.open("wb") as file,
            gzip.GzipFile("", "wb", fileobj=file, mtime=epoch_s) as packed,
            tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar,
        ):
            tar.add(base_dir, filter=without_origin)
        return str(archive)


packages = ["isthmus", *(f"isthmus.{name}" for name in find_packages("isthmus"))]
for folder in MAPPED:
    packages.append(f"isthmus.{folder}")
    packages.extend(f"isthmus.{folder}.{name}" for name in find_packages(folder))

setup(packages=packages, cmdclass={"sdist": ReproducibleSdist})
