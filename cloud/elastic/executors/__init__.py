"""Where batches run: in threads of the server, or in processes of their own."""
