"""Checks over facts that no server at hand has."""

from dataclasses import replace
from typing import Any

import pytest

from realtime_bridge.broker.redis import RedisInfo
from realtime_bridge.checks.clocks import clock_outcome
from realtime_bridge.checks.facts import Access, Column, Facts, Publication, Role, Server, Slot, Table
from realtime_bridge.checks.finding import Outcome, failed, find, ok, problem, skip, softened, warning
from realtime_bridge.checks.redis import RedisFacts, redis_clock, redis_persistence, redis_version
from realtime_bridge.checks.server import postgres_version, replication_slots, slot, slot_lag, wal_senders
from realtime_bridge.checks.supabase import SUPABASE_CHECKS, Answer, realtime, refused_table, rest, rest_table
from realtime_bridge.checks.tables import grant, policy, repair_column
from realtime_bridge.checks.tokens import jwks, jwt_secret
from realtime_bridge.errors import ConfigurationError, SourceError
from realtime_bridge.jwks import parse_jwks
from realtime_bridge.settings import Settings
from tests.services import SECRET, token

SERVER = Server(
    version=180_000,
    version_text="18.0",
    wal_level="logical",
    slots=10,
    slots_used=0,
    senders=10,
    senders_used=0,
    slot_keep_megabytes=1024,
    role="postgres",
    auth_functions=("uid",),
)
SLOT = Slot(
    plugin="pgoutput", here=True, temporary=False, holder=None, application="", wal_status="reserved", lag_bytes=0
)
TABLE = Table(
    name="public.posts",
    sql_name="public.posts",
    sql_schema="public",
    kind="r",
    persistence="p",
    key=("id",),
    identity="f",
    partial_leaves=(),
    row_security=True,
    columns=(),
    published=True,
    published_columns=None,
    narrow=(),
    row_filter=None,
    policies={},
    rule=None,
    access={},
)
NOBODY = Access(schema_usage=True, select=False, owner=False, policies=())
FACTS = Facts(
    server=SERVER,
    slot=SLOT,
    publication=Publication((), via_root=True, generated=False),
    roles=[Role("anon", exists=True, exempt="", takeable=True)],
    tables=[TABLE],
    publication_name="bridge",
    slot_name="bridge",
    namespace="ours",
    fact_seconds=5,
    repair_column="updated_at",
    owned=True,
)
REDIS = RedisFacts(RedisInfo("7.2.4", "noeviction", append_only=True, snapshots=True, replicas=0), "", 0.0)


def status(outcome: Outcome | None) -> str | None:
    return None if outcome is None else outcome.status


# -- findings ----------------------------------------------------------------------------------------------------------


def test_a_check_names_its_finding_and_one_that_does_not_apply_makes_none() -> None:
    def blue(_colour: str) -> Outcome:
        return warning("It is blue.", "Paint it.")

    def green(_colour: str) -> Outcome | None:
        return None

    (finding,) = find([blue, green], "sky", of="sky")
    assert (finding.name, finding.status, finding.detail, finding.fix) == (
        "blue sky",
        "warning",
        "It is blue.",
        "Paint it.",
    )
    assert [(f.name, f.status) for f in skip([blue, green], "too dark")] == [("blue", "skipped"), ("green", "skipped")]
    assert not failed([finding])


def test_only_problems_are_softened() -> None:
    assert [status(softened(outcome)) for outcome in (ok(""), warning(""), problem(""))] == ["ok", "warning", "warning"]


# -- Postgres ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("version", "expected"), [(140_011, "problem"), (150_000, "ok"), (190_000, "ok")])
def test_postgres_has_to_be_15_or_later(version: int, expected: str) -> None:
    assert postgres_version(replace(SERVER, version=version)).status == expected


def test_a_full_house_is_a_problem_only_for_who_is_not_in_it() -> None:
    full = replace(FACTS, server=replace(SERVER, slots_used=10, senders_used=10))
    assert replication_slots(full).status == "ok"
    assert replication_slots(replace(full, slot=None)).status == "problem"
    assert wal_senders(full).status == "problem"
    assert wal_senders(replace(full, slot=replace(SLOT, holder="ours/1"))).status == "ok"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, "ok"),
        ({"wal_status": "lost"}, "problem"),
        ({"plugin": "wal2json"}, "problem"),
        ({"plugin": None}, "problem"),
        ({"here": False}, "problem"),
        ({"temporary": True}, "problem"),
        ({"holder": "ours/1 (role a)", "application": "ours/1"}, "ok"),
        ({"holder": "ours-too/1 (role a)", "application": "ours-too/1"}, "problem"),
    ],
)
def test_the_slot_has_to_be_ours_and_whole(change: dict[str, Any], expected: str) -> None:
    assert slot(replace(FACTS, slot=replace(SLOT, **change))).status == expected


@pytest.mark.parametrize(
    ("change", "expected", "drops"),
    [
        ({}, "ok", False),
        ({"lag_bytes": 2 << 30}, "warning", True),
        ({"lag_bytes": 2 << 30, "holder": "ours/1"}, "warning", False),
        ({"wal_status": "unreserved"}, "warning", False),
        ({"wal_status": "lost"}, None, False),
    ],
)
def test_much_wal_kept_for_the_slot_is_told(change: dict[str, Any], expected: str | None, drops: bool) -> None:
    outcome = slot_lag(replace(FACTS, slot=replace(SLOT, **change)))
    assert status(outcome) == expected
    assert (outcome is not None and "pg_drop_replication_slot" in outcome.fix) is drops


def test_anon_may_be_shut_out_unless_it_is_the_only_role() -> None:
    anon, user = FACTS.roles[0], Role("authenticated", exists=True, exempt="", takeable=True)
    assert grant(FACTS, TABLE, anon, NOBODY).status == "problem"
    assert status(policy(FACTS, TABLE, anon, NOBODY)) == "problem"
    both = replace(FACTS, roles=[anon, user])
    assert grant(both, TABLE, anon, NOBODY).status == "warning"
    assert status(policy(both, TABLE, anon, NOBODY)) == "warning"
    assert grant(both, TABLE, user, NOBODY).status == "problem"


def test_without_an_owners_column_the_policy_is_left_to_the_reader() -> None:
    outcome = policy(FACTS, TABLE, FACTS.roles[0], NOBODY)
    assert outcome is not None
    assert "…" in outcome.fix
    assert policy(FACTS, TABLE, replace(FACTS.roles[0], exempt="it is a superuser"), NOBODY) is None


# -- clocks and Redis --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("offset", "words"), [(1.5, "1.5 s ahead of"), (-90, "90.0 s behind")])
def test_a_clock_more_than_a_second_off_is_told_with_its_direction(offset: float, words: str) -> None:
    assert clock_outcome("Postgres", 0.9).status == "ok"
    outcome = clock_outcome("Postgres", offset)
    assert (outcome.status, words in outcome.detail) == ("warning", True)
    assert redis_clock(replace(REDIS, clock_offset=offset)).status == "warning"


@pytest.mark.parametrize(
    ("version", "expected"), [("6.0.16", "problem"), ("6.2.0", "ok"), ("10.0", "ok"), ("", "problem")]
)
def test_redis_has_to_be_6_2_or_later(version: str, expected: str) -> None:
    assert redis_version(replace(REDIS, info=replace(REDIS.info, version=version))).status == expected


@pytest.mark.parametrize(
    ("append_only", "snapshots", "expected"),
    [(True, False, "ok"), (False, True, "ok"), (False, None, "ok"), (False, False, "warning")],
)
def test_a_redis_that_forgets_all_at_a_restart_is_told(
    append_only: bool, snapshots: bool | None, expected: str
) -> None:
    info = replace(REDIS.info, append_only=append_only, snapshots=snapshots)
    assert redis_persistence(replace(REDIS, info=info)).status == expected


# -- tokens and keys ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("secret", "expected"),
    [
        ("hunter2", "warning"),
        (SECRET, "ok"),
        ("-----BEGIN PUBLIC KEY-----\nMFk=\n-----END PUBLIC KEY-----\n", "problem"),
        (None, "ok"),
    ],
)
def test_a_secret_that_can_be_guessed_or_is_none_is_told_and_not_shown(secret: str | None, expected: str) -> None:
    outcome = jwt_secret(Settings.load(env_file=None, whole=False, supabase_jwt_secret=secret))
    assert outcome.status == expected
    assert secret is None or secret not in outcome.detail + outcome.fix


PROJECT = "https://abcdef.supabase.co"


@pytest.mark.parametrize(
    ("url", "key", "expected"),
    [
        (PROJECT, "sb_secret_123", {"supabase_url": "ok", "supabase_key": "ok"}),
        (PROJECT, "sb_publishable_123", {"supabase_url": "ok", "supabase_key": "problem"}),
        (PROJECT, "something", {"supabase_url": "ok", "supabase_key": "warning"}),
        (PROJECT, "sb_secret_\N{CYRILLIC SMALL LETTER A}", {"supabase_url": "ok", "supabase_key": "problem"}),
        (PROJECT, "sb_secret_1\nsb_secret_2", {"supabase_url": "ok", "supabase_key": "problem"}),
        (PROJECT, token(None, "anon"), {"supabase_url": "ok", "supabase_key": "problem"}),
        (PROJECT, token("ada"), {"supabase_url": "ok", "supabase_key": "problem"}),
        (PROJECT, token(None, "service_role", ttl=-1), {"supabase_url": "ok", "supabase_key": "problem"}),
        (
            PROJECT,
            token(None, "service_role", ref="abcdef"),
            {"supabase_url": "ok", "supabase_key": "ok", "supabase_project": "ok"},
        ),
        (
            PROJECT,
            token(None, "service_role", ref="other"),
            {"supabase_url": "ok", "supabase_key": "ok", "supabase_project": "problem"},
        ),
        (f"{PROJECT}/rest/v1", "sb_secret_1", {"supabase_url": "problem", "supabase_key": "ok"}),
        ("abcdef.supabase.co", "sb_secret_1", {"supabase_url": "problem", "supabase_key": "ok"}),
        ("http://abcdef.supabase.co", "sb_secret_1", {"supabase_url": "problem", "supabase_key": "ok"}),
        ("http://[", "sb_secret_1", {"supabase_url": "problem", "supabase_key": "ok"}),
    ],
)
def test_address_and_key_of_a_project_are_told_apart(url: str, key: str, expected: dict[str, str]) -> None:
    findings = find(SUPABASE_CHECKS, Settings.load(env_file=None, whole=False, supabase_url=url, supabase_key=key))
    assert {finding.name: finding.status for finding in findings} == expected
    assert key not in str(findings)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (Answer("public.posts", 200), "ok"),
        (Answer("public.posts", 404), "ok"),
        (Answer("public.posts", None, "timed out"), "problem"),
        (Answer("public.posts", 401, "status 401: Legacy API keys are disabled"), "problem"),
        (Answer("public.posts", 503), "problem"),
        (Answer("public.posts", 540), "problem"),
    ],
)
def test_rest_has_to_answer_and_to_take_the_key(answer: Answer, expected: str) -> None:
    outcome = rest([Answer("public.notes", 200), answer])
    assert (outcome.status, answer.told in outcome.detail) == (expected, expected != "ok" or not answer.told)


@pytest.mark.parametrize(
    ("status", "expected", "fix"),
    [
        (200, "ok", ""),
        (402, "warning", ""),
        (403, "problem", 'GRANT SELECT ON "app"."posts" TO service_role;'),
        (404, "warning", "NOTIFY pgrst, 'reload schema';"),
        (406, "warning", ""),
    ],
)
def test_a_table_that_rest_does_not_show_is_told_with_what_mends_it(status: int, expected: str, fix: str) -> None:
    outcome = rest_table(Answer("app.posts", status, f"status {status}"))
    assert outcome.status == expected
    assert outcome.fix.endswith(fix)


def test_the_table_that_realtime_refuses_is_read_from_its_words() -> None:
    refusal = (
        "Unable to subscribe to changes with given parameters. Please check Realtime is enabled for the given connect "
        "parameters: [event: *, schema: public, table: posts, filters: [], select: nil]"
    )
    assert refused_table(refusal) == "public.posts"
    exception = (
        "An exception happened so please check your connect parameters: [event: *, schema: public, table: posts]"
    )
    assert refused_table(exception) == ""
    assert refused_table("None") == ""


def test_a_realtime_that_does_not_subscribe_is_a_problem_whatever_the_reason() -> None:
    assert realtime(None).status == "ok"
    for error in (ConfigurationError("SUPABASE_KEY: the project refuses this key"), SourceError("disconnected")):
        outcome = realtime(error)
        assert (outcome.status, str(error) in outcome.detail) == ("problem", True)


@pytest.mark.parametrize(
    ("secret", "project", "document", "expected"),
    [
        (SECRET, True, b'{"keys":[]}', "ok"),
        (SECRET, True, b'{"keys":[{"kty":"oct"}]}', "warning"),
        (None, True, b'{"keys":[]}', "warning"),
        (None, True, b'{"keys":[{"kty":"oct"}]}', "warning"),
        (None, False, b'{"keys":[]}', "problem"),
    ],
)
def test_without_a_public_key_it_depends_on_what_stands_in_for_it(
    secret: str | None, project: bool, document: bytes, expected: str
) -> None:
    fields = {"supabase_url": PROJECT, "supabase_key": "sb_secret_1"} if project else {"supabase_jwks_url": PROJECT}
    settings = Settings.load(env_file=None, whole=False, supabase_jwt_secret=secret, **fields)
    outcome = jwks(settings, *parse_jwks(document))
    assert outcome.status == expected
    assert bool(outcome.fix) is (secret is None)
    assert ("kty or crv is not accepted" in outcome.detail) is (b"oct" in document)


def test_a_table_that_cannot_be_repaired_is_named_where_that_matters() -> None:
    supabase = replace(FACTS, owned=False)
    dated = replace(TABLE, columns=(Column("updated_at", "timestamptz", "b", ""),))
    assert status(repair_column(FACTS, TABLE)) is None
    assert status(repair_column(supabase, TABLE)) == "warning"
    assert status(repair_column(supabase, dated)) == "ok"
    assert status(repair_column(replace(supabase, repair_column="version"), dated)) == "warning"
