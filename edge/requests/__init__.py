"""Requests of other processes to a device: the socket, the table of requests, and what each of them does."""
