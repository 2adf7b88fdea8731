"""Tenants: whose a call is, what it may use, and what is refused beyond a quota."""
