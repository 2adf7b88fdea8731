"""The device's own page: what it sees, answers, knows and sends, shown by a server on loopback."""
