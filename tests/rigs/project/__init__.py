"""Commands, pages and tutorials of the project itself, run or read by tests."""
