"""The wire: servicers that map messages, scopes around each call. Only this folder and ``server.py`` import grpc."""
