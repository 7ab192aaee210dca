"""A stand-in for a Supabase project on this machine, which can be told to misbehave."""

from realtime_bridge.dev.supabase.project import LocalSupabase

__all__ = ["LocalSupabase"]
