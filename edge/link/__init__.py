"""The connection to the cloud: its interface, gRPC, the outbox, and the choice of compression."""
