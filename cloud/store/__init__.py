"""State that outlives a process: the database, the artefacts, and the lock that keeps a second server out."""
