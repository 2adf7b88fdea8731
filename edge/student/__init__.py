"""The student on the device: fetch, verify, try, swap and run it."""
