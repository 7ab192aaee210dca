"""History × audience × filters → sinks."""
