"""The connection to the cloud: the interface, gRPC behind it, what waits to be sent, and how hard to compress."""
