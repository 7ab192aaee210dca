"""From a request to a sink and back."""
