"""Live data from Postgres or Supabase for every browser, exactly as row-level security allows."""

__version__ = "0.1.0"
