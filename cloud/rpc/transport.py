"""The transport: TLS whose certificate is read again when its file changes, and the bounds that gRPC itself keeps."""

import logging
import resource
import ssl
import threading
from pathlib import Path
from typing import Any, Final

import grpc
from cryptography import x509

from isthmus.proto import keepalive
from isthmus.proto.errors import InvalidInput
from isthmus.proto.limits import MAX_IMAGE_MESSAGE_BYTES, MAX_MESSAGE_BYTES

log = logging.getLogger(__name__)

_DEVICE_STREAMS: Final = 512
_ELASTIC_STREAMS: Final = 1_024
"""Calls that one connection may have open. A client of elastic serving sends many pictures at a time."""
_OWN_FILES: Final = 256
"""Files that the server itself has open: database, students, worker."""


def options(connections: int, *, elastic: bool) -> tuple[tuple[str, int], ...]:
    """Return the server's channel arguments. Raises this process's limit of open files to fit ``connections``.

    ``elastic``: whether pictures arrive too; then messages and connections may be larger.
    """
    message_bytes = MAX_IMAGE_MESSAGE_BYTES if elastic else MAX_MESSAGE_BYTES
    return (
        ("grpc.max_receive_message_length", message_bytes),
        ("grpc.max_send_message_length", message_bytes),
        ("grpc.max_metadata_size", 8 << 10),
        ("grpc.max_concurrent_streams", _ELASTIC_STREAMS if elastic else _DEVICE_STREAMS),
        ("grpc.max_allowed_incoming_connections", min(connections, _raise_file_limit(connections))),
        # A connection that never completes its handshake, or has had no call for long, makes room for others.
        ("grpc.server_handshake_timeout_ms", 10_000),
        ("grpc.max_connection_idle_ms", 300_000),
        # With port reuse, two servers on one port would each receive some of the devices at random.
        ("grpc.so_reuseport", 0),
        *keepalive.server_options(),
    )


def identity_of(context: Any) -> str | None:
    """Return the identity in a caller's TLS certificate: its first alternative name, else its common name.

    None if the server asks for no certificates. gRPC has verified the certificate.
    """
    names = context.peer_identities()
    name = next(iter(names), None) if names else None
    return name.decode("utf-8", "replace")[:255] if isinstance(name, bytes) else None


class Certificates:
    """The server's certificate and key, and the authority of its clients' certificates, from files.

    New connections get what the files hold now. Connections that are open go on: they have verified what they needed.
    A file that is half-written, or a pair that does not fit, changes nothing until it does.
    """

    def __init__(self, cert: Path, key: Path, client_ca: Path | None = None) -> None:
        """Raises InvalidInput if the files cannot be used as they are."""
        self._cert, self._key, self._client_ca = cert, key, client_ca
        self._lock = threading.Lock()
        try:
            self._stamp = self._stamps()
            self._config = self._read()
        except OSError as error:
            raise InvalidInput(f"TLS: {error}") from error

    def credentials(self) -> grpc.ServerCredentials:
        """Return what a server's port needs. With ``client_ca`` every client must show a certificate of it."""
        return grpc.dynamic_ssl_server_credentials(
            self._config, self._now, require_client_authentication=self._client_ca is not None
        )

    @property
    def expires_s(self) -> float:
        """When the certificate in use ends, in Unix seconds."""
        return self._expires_s

    def _now(self) -> Any:
        """Return the configuration for a new connection; None if it is that of the connection before."""
        with self._lock:
            try:
                stamp = self._stamps()
                if stamp == self._stamp:
                    return None
                self._config, self._stamp = self._read(), stamp
            except (OSError, InvalidInput) as error:
                log.warning("the TLS files were changed and cannot be used yet: %s", error)
                return None
            log.info("the TLS certificate was read again")
            return self._config

    def _stamps(self) -> tuple[tuple[int, int, int], ...]:
        found = [each.stat() for each in (self._cert, self._key, self._client_ca) if each is not None]
        return tuple((each.st_mtime_ns, each.st_size, each.st_ino) for each in found)

    def _read(self) -> Any:
        _check_pair(self._cert, self._key)
        chain = self._cert.read_bytes()
        self._expires_s = x509.load_pem_x509_certificate(chain).not_valid_after_utc.timestamp()
        authority = None if self._client_ca is None else self._client_ca.read_bytes()
        if self._client_ca is not None:
            try:
                x509.load_pem_x509_certificates(authority or b"")
            except ValueError as error:
                raise InvalidInput(f"TLS: {self._client_ca} holds no PEM certificate") from error
        return grpc.ssl_server_certificate_configuration([(self._key.read_bytes(), chain)], authority)


def _check_pair(cert: Path, key: Path) -> None:
    """Check that certificate and key belong together; gRPC does not say what is wrong. Raises InvalidInput, OSError."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise InvalidInput(f"TLS: the key {key} does not belong to the certificate {cert}") from error
        raise InvalidInput(f"TLS: {cert} and {key} are not a PEM certificate chain and its private key") from error


def _raise_file_limit(connections: int) -> int:
    """Allow as many open files as ``connections`` and our own need; return how many connections fit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + _OWN_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        if soft < wanted:
            log.warning("the system allows %d open files, %d connections need %d", soft, connections, wanted)
    return connections if soft == resource.RLIM_INFINITY else max(64, soft - _OWN_FILES)
