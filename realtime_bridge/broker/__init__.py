"""The ordered history, its notification and the lease."""
