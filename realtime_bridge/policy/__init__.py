"""Who may see a change."""
