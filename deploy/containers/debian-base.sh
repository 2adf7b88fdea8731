#!/bin/sh
# Make the base image of the container files from Debian's packages, where no registry of images can be reached.
#
#   deploy/containers/debian-base.sh [SUITE]      as root; needs buildah and debootstrap; SUITE: bookworm
#   buildah bud --isolation chroot --build-arg BASE=localhost/isthmus-base -f deploy/containers/cloud.Containerfile .
#
# The image has Debian's smallest system and its Python 3, nothing else.
set -eu

suite=${1:-bookworm}
image=localhost/isthmus-base
root=$(mktemp -d)
trap 'rm -rf --one-file-system "$root"' EXIT

debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates "$suite" "$root/files"
rm -rf "$root"/files/var/cache/apt/* "$root"/files/var/lib/apt/lists/* "$root"/files/usr/share/doc/* \
    "$root"/files/usr/share/man/* "$root"/files/usr/share/locale/* "$root"/files/var/log/*
container=$(buildah from scratch)
buildah add --quiet "$container" "$root/files" /
buildah config --cmd /bin/sh --env PATH=/usr/local/bin:/usr/bin:/bin "$container"
buildah commit --quiet --rm "$container" "$image"
echo "$image: Debian $suite with $(chroot "$root/files" python3 --version)"
