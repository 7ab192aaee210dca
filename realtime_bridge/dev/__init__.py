"""Everything a laptop needs: embedded engines, sample schema, writer, local Supabase."""
