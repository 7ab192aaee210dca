"""The sample REST resource."""
