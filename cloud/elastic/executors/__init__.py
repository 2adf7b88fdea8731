"""Where batches run: in threads of the server, in processes of their own, or in actors on a Ray cluster."""
