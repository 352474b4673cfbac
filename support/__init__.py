"""Plumbing that a reader of the method may take for granted. Nothing here imports from the root."""
