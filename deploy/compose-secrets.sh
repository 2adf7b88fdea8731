#!/bin/sh
# Make the secrets that deploy/compose.yaml needs, once: keys and passwords. What is there already stays.
#
#   sudo deploy/compose-secrets.sh FOLDER
#
# Run private-ca.sh on the same folder first, for ca.pem, tls.pem and tls.key. As root it gives the cloud's files to user
# 10001, as whom the containers run; without root they must be able to read them some other way.
set -eu
umask 077

if [ $# -ne 1 ] || [ ! -f "$1/tls.key" ]; then
    echo "usage: $0 FOLDER; first: private-ca.sh FOLDER cloud.example" >&2
    exit 2
fi
cd "$1"

password() {
    [ -s "$1" ] || openssl rand -hex 24 | tr -d '\n' > "$1"
}
for name in enrolment.key postgres.password s3.password grafana.password; do
    password "$name"
done
[ -s s3.user ] || printf isthmus > s3.user
# An Ed25519 private key is 32 random bytes.
[ -s signing.key ] || openssl rand 32 > signing.key
if [ ! -s cloud.env ]; then
    {
        echo "ISTHMUS_CLOUD_DATABASE=postgresql://isthmus:$(cat postgres.password)@postgres/isthmus"
        echo "AWS_ACCESS_KEY_ID=$(cat s3.user)"
        echo "AWS_SECRET_ACCESS_KEY=$(cat s3.password)"
    } > cloud.env
fi
if [ "$(id -u)" = 0 ]; then
    chown 10001:10001 signing.key enrolment.key tls.key
    # These are read by other users in their containers, and nobody else can enter the folder.
    chmod 644 postgres.password s3.user s3.password grafana.password
    chmod 711 .
    # Who called sudo starts Compose, which reads this file itself.
    [ -z "${SUDO_UID:-}" ] || chown "$SUDO_UID" cloud.env
fi
echo "$1 holds the secrets; keep signing.key, every device trusts it"
