"""Tasks: what counts as a right answer."""
