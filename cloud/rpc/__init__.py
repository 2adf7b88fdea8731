"""The wire: servicers that map messages, scopes around each call. Only this folder, load and server.py import grpc."""
