#!/bin/sh
# Make a private certificate authority, and a server's certificate of it, to try out TLS.
#
#   deploy/private-ca.sh FOLDER NAME_OR_ADDRESS...
#
# Writes to FOLDER: ca.pem (give it to devices as --tls-ca), ca.key, tls.pem and tls.key (the server's --tls-cert and
# --tls-key). Called again, it keeps the authority and makes a new certificate, for example before the old one ends.
set -eu
umask 077

if [ $# -lt 2 ]; then
    echo "usage: $0 FOLDER NAME_OR_ADDRESS..., for instance: $0 certificates cloud.example 192.0.2.10" >&2
    exit 2
fi
folder=$1
shift
names=""
for name in "$@"; do
    case $name in
    *[!0-9a-zA-Z.:*-]* | "") echo "$0: '$name' is no host name or address" >&2 && exit 2 ;;
    *[!0-9.]*) case $name in *:*) kind=IP ;; *) kind=DNS ;; esac ;;
    *) kind=IP ;;
    esac
    names="$names${names:+,}$kind:$name"
done

mkdir -p "$folder"
if [ ! -f "$folder/ca.key" ]; then
    openssl req -x509 -newkey ed25519 -nodes -days 3650 -subj "/CN=Isthmus private authority" \
        -addext "basicConstraints=critical,CA:TRUE,pathlen:0" -addext "keyUsage=critical,keyCertSign,cRLSign" \
        -keyout "$folder/ca.key" -out "$folder/ca.pem" 2>/dev/null
fi
request=$(mktemp "$folder/request.XXXXXX")
trap 'rm -f "$request" "$request.ext"' EXIT
printf 'subjectAltName=%s\nextendedKeyUsage=serverAuth\nbasicConstraints=critical,CA:FALSE\n' "$names" >"$request.ext"
openssl req -newkey ed25519 -nodes -subj "/CN=$1" -keyout "$folder/tls.key" -out "$request" 2>/dev/null
openssl x509 -req -in "$request" -CA "$folder/ca.pem" -CAkey "$folder/ca.key" -days 90 -set_serial "0x$(openssl rand -hex 16)" \
    -extfile "$request.ext" -out "$folder/tls.pem" 2>/dev/null
chmod 644 "$folder/ca.pem" "$folder/tls.pem"
echo "$folder/tls.pem is for $names and ends in 90 days; devices trust $folder/ca.pem"
