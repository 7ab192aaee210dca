"""Messages and frames as bytes; no I/O."""
