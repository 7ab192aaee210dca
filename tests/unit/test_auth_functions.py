"""Which bodies of the auth functions are taken to read the claims as Supabase's do."""

import pytest

from realtime_bridge.policy.references import reads_claims

SETTING = "nullif(current_setting('request.jwt.claim.sub', true), '')"
CLAIMS = "nullif(current_setting('request.jwt.claims', true), '')"


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("uid", f"\n  select {SETTING}::uuid;\n"),
        ("uid", f"select\n  coalesce(\n {SETTING},\n ({CLAIMS}::jsonb ->> 'sub')\n )::uuid\n"),
        ("uid", f"SELECT ({CLAIMS}::json->>'sub')::uuid"),
        ("uid", "select (current_setting('request.jwt.claims', true)::jsonb ->> 'sub')::uuid"),
        ("role", f"select ({CLAIMS}::jsonb ->> 'role')::text"),
        ("jwt", f"select coalesce(nullif(current_setting('request.jwt.claim', true), ''), {CLAIMS})::jsonb"),
        ("jwt", f"select {CLAIMS}::jsonb"),
    ],
)
def test_every_form_that_supabase_has_had_is_known(name: str, body: str) -> None:
    assert reads_claims(name, body)


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("uid", f"select ({CLAIMS}::jsonb ->> 'user_id')::uuid"),
        ("uid", f"select ({CLAIMS}::jsonb ->> 'sub')::uuid where not exists (select from banned)"),
        ("uid", "select id from users where name = current_user"),
        ("uid", "select current_setting('request.jwt.claims.sub', true)::uuid"),
        ("uid", ""),
        ("role", f"select ({CLAIMS}::jsonb ->> 'sub')::text"),
        ("jwt", f"select ({CLAIMS}::jsonb -> 'app_metadata')::jsonb"),
    ],
)
def test_any_other_body_is_not(name: str, body: str) -> None:
    assert not reads_claims(name, body)
