"""What the pages of device and cloud share: the front end, and a server that answers only who knows the token."""
