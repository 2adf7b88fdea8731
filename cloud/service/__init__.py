"""The parts of a server: what it opens, its gRPC services, and its ports."""
