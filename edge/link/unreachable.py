"""PURE: why the cloud cannot be reached, in words that tell a person what to change.

gRPC gives one status for all of it, and the reason only in its message.
"""

from typing import Final

_REASONS: Final = (
    ("certificate has expired", "its certificate has expired, or this device's clock is wrong"),
    ("certificate is not yet valid", "its certificate is not valid yet, or this device's clock is wrong"),
    ("Hostname Verification Check failed", "its certificate is for another name: use the name that is in it"),
    (
        "CERTIFICATE_VERIFY_FAILED",
        "its certificate is signed by no authority that this device knows: give the authority with --tls-ca FILE",
    ),
    ("WRONG_VERSION_NUMBER", "it does not speak TLS: check the address, or leave out --tls and --tls-ca"),
    ("Failed parsing HTTP/2", "another kind of server answers there: check the address and the port"),
    ("Connection refused", "nothing listens at this address: check it, and that the cloud runs"),
    ("Domain name not found", "there is no machine of this name: check the address, and this device's network"),
)


def why(details: str) -> str:
    """Return the sentence for a person; ``details``: gRPC's message.

    >>> why("ipv4:127.0.0.1:50051: Failed to connect to remote host: Connection refused")
    'the cloud cannot be reached: nothing listens at this address: check it, and that the cloud runs'
    """
    for part, reason in _REASONS:
        if part in details:
            return f"the cloud cannot be reached: {reason}"
    return "the cloud cannot be reached"
