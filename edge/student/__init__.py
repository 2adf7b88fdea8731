"""The student on the device: fetch, verify, swap and run it."""
