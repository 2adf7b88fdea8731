#!/bin/sh
# Run a built image of the cloud as a container engine would, where there is none, and say what it did.
#
#   deploy/containers/try.sh RELEASE [IMAGE]      as root; needs buildah and util-linux; IMAGE: isthmus-cloud
#
# The root is mounted read-only, /state is the one place to write, the user is 10001 without any capability, and the
# server is process 1 of its own. It must become ready, write nowhere else, and end in order at SIGTERM.
set -eu

release=$(realpath "$1")
container=$(buildah from "${2:-isthmus-cloud}")
root=$(buildah mount "$container")
state=$(mktemp -d)
steps=$(mktemp)
end() {
    rm -rf "$state" "$steps"
    buildah umount "$container" >/dev/null
    buildah rm "$container" >/dev/null
}
trap end EXIT
chown 10001:10001 "$state"

# The mounts are gone with the namespace. exec keeps every step the same process, so the server becomes process 1.
cat >"$steps" <<'INSIDE'
set -eu
mount --bind "$ROOT" "$ROOT"
mkdir -p "$ROOT/release"
mount --bind "$RELEASE" "$ROOT/release"
mount -o remount,bind,ro "$ROOT/release"
mount --bind "$STATE" "$ROOT/state"
mount -t proc -o nosuid,nodev,noexec proc "$ROOT/proc"
for each in null zero urandom random; do
    touch "$ROOT/dev/$each"
    mount --bind "/dev/$each" "$ROOT/dev/$each"
done
mount -o remount,bind,ro "$ROOT"
cd /
exec chroot "$ROOT" setpriv --reuid=10001 --regid=10001 --clear-groups --no-new-privs \
    --inh-caps=-all --ambient-caps=-all --bounding-set=-all \
    env -i PATH=/opt/isthmus/bin:/usr/bin:/bin HOME=/state TMPDIR=/state OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=1 \
    sh -c "$COMMAND"
INSIDE

inside() {
    ROOT=$root STATE=$state RELEASE=$release COMMAND=$1 \
        unshare --mount --pid --fork --kill-child --uts --ipc sh "$steps"
}

inside 'for place in / /etc /opt/isthmus /release /usr; do
    ! touch "$place/.written" 2>/dev/null || { echo "$place can be written to"; exit 1; }
done
touch /state/.written && rm /state/.written
grep -E "^(Uid|CapEff|CapBnd|NoNewPrivs)" /proc/self/status'

inside 'exec isthmus cloud serve --release /release --state /state --port-file /state/port' &
outside=$!
seconds=0
until [ -s "$state/port" ]; do
    kill -0 "$outside" 2>/dev/null || { echo "the server ended before it was ready"; exit 1; }
    sleep 1
    seconds=$((seconds + 1))
done
server=$outside
while [ "$(awk '/^NSpid/ {print NF}' "/proc/$server/status")" -lt 3 ]; do
    read -r server _ <"/proc/$server/task/$server/children" || true  # its line has no end
done
echo "ready after $seconds s at $(cat "$state/port"), as process" \
    "$(awk '/^NSpid/ {print $NF}' "/proc/$server/status") of its own"
kill -TERM "$server"
status=0
wait "$outside" || status=$?
echo "ended at SIGTERM with status $status; in /state: $(ls -A "$state" | tr '\n' ' ')"
exit "$status"
