"""The wire: servicers that only map, and scopes around every call. Only this folder and ``server.py`` import grpc."""
