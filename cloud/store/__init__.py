"""State that outlives a process: the database, the artefacts, and the lock on an embedded database."""
