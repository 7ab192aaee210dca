"""`realtime-bridge why`: each policy and its parts, the verdict of the engine, and what Postgres says of it."""

import json
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest

from tests.bridges import environment, run
from tests.command_line import CommandLine

pytestmark = pytest.mark.integration

ANN = "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"
SCHEMA = f"""
create table members (user_id uuid, org int, primary key (user_id, org));
alter table members enable row level security;
create policy own on members using (user_id = auth.uid());
grant select on members to authenticated;
create function is_open(org int) returns bool language plpgsql as $$ begin return org = 7; end $$;

create table papers (org int, name text, owner uuid, hidden bool, secret text, primary key (org, name));
alter table papers enable row level security;
create policy everybody on papers to anon using (true);
create policy members on papers to authenticated using (
  org in (select m.org from members m where m.user_id = auth.uid()));
create policy open on papers using (is_open(org) and hidden is null);
create policy owner on papers using (auth.uid() = owner and not hidden);
create policy shown on papers as restrictive using (hidden is not true);
grant select (org, name, owner, hidden) on papers to authenticated;

insert into members values ('{ANN}', 1);
insert into papers values (1, 'a,b=c', '{ANN}', false, 'x'), (7, '', null, null, 'x'), (8, '', '{ANN}', true, 'x');

-- What asks in the bridge's name has a setting that a SELECT has not.
create function is_bridge(key int) returns bool language plpgsql as
  $$ begin return current_setting('check_function_bodies') = 'off'; end $$;
create table odd (id int primary key);
alter table odd enable row level security;
create policy odd on odd using (is_bridge(id));
create table plain (id int primary key);
grant select on odd, plain to authenticated;
insert into odd values (1);
insert into plain values (1);
"""


class Why:
    """Calls `realtime-bridge why` as an operator does."""

    def __init__(self, database: str, command: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.database = database
        self._command = command
        self._monkeypatch = monkeypatch

    def __call__(self, *arguments: str, **settings: str) -> tuple[int, str, str]:
        """Exit status, standard output and standard error."""
        tables = "public.papers,public.members,public.odd,public.plain"
        with self._monkeypatch.context() as patched:
            for name, value in environment(self.database, **{"BRIDGE_TABLES": tables, **settings}).items():
                patched.setenv(name, value)
            return self._command("why", *arguments)

    def json(self, *arguments: str, status: int = 0, **settings: str) -> Any:
        code, out, err = self(*arguments, "--json", **settings)
        assert (code, err) == (status, "")
        return json.loads(out)


@pytest.fixture
def why(database: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Why:
    monkeypatch.chdir(tmp_path)
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(SCHEMA)
    return Why(database, CommandLine(monkeypatch, capsys), monkeypatch)


def told(document: Any) -> dict[str, tuple[str | None, list[str], dict[str, tuple[str, list[str]]]]]:
    """Policy → what it comes to, how, and the same of its parts."""
    return {
        policy["name"]: (
            policy["outcome"],
            policy["ways"],
            {part["sql"]: (part["outcome"], part["ways"]) for part in policy["parts"]},
        )
        for policy in document["policies"]
    }


# -- what is told ------------------------------------------------------------------------------------------------------

MEMBERS = "org IN (SELECT m.org FROM public.members m WHERE m.user_id = auth.uid())"


def test_every_policy_is_told_with_what_its_parts_come_to_and_how(why: Why) -> None:
    document = why.json("--user", ANN, "--table", "public.papers", "--key", "org=1,name=a,b=c")
    assert told(document) == {
        "everybody": (None, [], {}),
        "members": ("TRUE", ["index"], {MEMBERS: ("TRUE", ["index"])}),
        "open": (
            "not TRUE",
            ["row", "database"],
            {"public.is_open(org)": ("FALSE", ["database"]), "hidden IS NULL": ("FALSE", ["row"])},
        ),
        "owner": (
            "TRUE",
            ["index", "row"],
            {"auth.uid() = owner": ("TRUE", ["index"]), '"hidden"': ("FALSE", ["row"])},
        ),
        "shown": ("TRUE", ["row"], {'"hidden"': ("FALSE", ["row"])}),
    }
    assert [policy["applies"] for policy in document["policies"]] == [False, True, True, True, True]
    assert [policy["permissive"] for policy in document["policies"]] == [True, True, True, True, False]
    assert (document["user"], document["role"], document["key"]) == (
        ANN,
        "authenticated",
        {"org": "1", "name": "a,b=c"},
    )
    assert (document["columns"], document["hidden"]) == (["org", "name", "owner", "hidden"], ["secret"])
    assert document["bridge"] == {
        "live": True,
        "resumed": True,
        "refusal": None,
        "ways": ["index", "row"],
        "missing": [],
    }
    assert document["postgres"] == {"visible": True, "error": None}
    assert document["differ"] is False


def test_a_restrictive_policy_that_is_not_true_hides_what_others_show(why: Why) -> None:
    document = why.json("--user", ANN, "--table", "public.papers", "--key", "org=8,name=")
    assert told(document)["shown"] == ("not TRUE", ["row"], {'"hidden"': ("TRUE", ["row"])})
    assert (document["bridge"]["live"], document["postgres"]["visible"], document["differ"]) == (False, False, False)


def test_a_row_that_only_postgres_can_decide_is_told_to_be_decided_by_it(why: Why) -> None:
    document = why.json("--user", ANN, "--table", "public.papers", "--key", "org=7,name=")
    assert told(document)["open"][:2] == ("TRUE", ["row", "database"])
    assert told(document)["owner"][2]["auth.uid() = owner"] == ("NULL", ["index"])
    assert document["bridge"]["ways"] == ["row", "database"]
    assert document["differ"] is False


def test_it_is_told_to_people_in_lines(why: Why) -> None:
    status, out, err = why("--user", ANN, "--table", "public.papers", "--key", "org=8,name=")
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        f"public.papers org=8, name= for {ANN}, role authenticated",
        "policy    everybody (permissive) does not apply to authenticated",
        "policy    members (permissive) is not TRUE, by index",
        f"          FALSE   index     {MEMBERS}",
        "policy    open (permissive) is not TRUE, by row, database",
        "          FALSE   database  public.is_open(org)",
        "          FALSE   row       hidden IS NULL",
        "policy    owner (permissive) is not TRUE, by index, row",
        "          TRUE    index     auth.uid() = owner",
        '          TRUE    row       "hidden"',
        "policy    shown (restrictive) is not TRUE, by row",
        '          TRUE    row       "hidden"',
        "columns   authenticated may read org, name, owner, hidden; not secret",
        "bridge    does not show it, by index, row, database",
        "Postgres  does not show it",
    ]


def test_a_role_without_grants_and_a_user_who_is_not_signed_in_see_nothing(why: Why) -> None:
    document = why.json("--table", "public.papers", "--key", "org=1,name=a,b=c")
    assert (document["user"], document["role"]) == (None, "anon")
    assert told(document)["everybody"] == ("TRUE", [], {})
    assert document["bridge"]["refusal"] == "role anon may not read public.papers"
    assert document["columns"] == []
    assert "permission denied for table papers" in document["postgres"]["error"]
    assert document["differ"] is False


def test_what_is_not_known_of_a_user_is_named(why: Why) -> None:
    arguments = ["--user", "ann", "--table", "public.papers", "--key", "org=7,name="]
    document = why.json(*arguments)
    assert told(document)["owner"][2]["auth.uid() = owner"] == ("unknown", ["index"])
    assert told(document)["members"][2][MEMBERS] == ("error", ["index"])
    assert "auth.uid()" in document["bridge"]["missing"]
    assert (document["bridge"]["live"], document["differ"]) == (False, False)
    assert "SQLSTATE 22P02" in document["postgres"]["error"]


def test_claims_are_those_of_a_token(why: Why) -> None:
    rule = json.dumps(
        {"public.plain": "auth.jwt() -> 'app' ->> 'plan' = 'pro' and auth.jwt() ->> 'aud' = 'authenticated'"}
    )
    arguments = ["--user", ANN, "--table", "public.plain", "--key", "1"]
    document = why.json(*arguments, "--claims", '{"app": {"plan": "pro"}}', BRIDGE_POLICIES=rule)
    assert document["bridge"]["live"] is True
    assert why.json(*arguments, BRIDGE_POLICIES=rule)["bridge"]["live"] is False
    rule = json.dumps({"public.plain": "auth.jwt() ->> 'aud' = 'readers' and auth.jwt() ->> 'iss' = 'us'"})
    document = why.json(*arguments, BRIDGE_POLICIES=rule, BRIDGE_AUDIENCE="readers", BRIDGE_ISSUER="us")
    assert document["bridge"]["live"] is True


def test_a_table_that_policies_read_is_explained_like_any_other(why: Why) -> None:
    document = why.json("--user", ANN, "--table", "public.members", "--key", f"org=1,user_id={ANN.upper()}")
    assert document["key"] == {"user_id": ANN, "org": "1"}
    assert (document["bridge"]["live"], document["bridge"]["resumed"], document["differ"]) == (True, True, False)


# -- differences -------------------------------------------------------------------------------------------------------


def test_what_the_bridge_shows_and_postgres_does_not_is_told_and_has_failed(why: Why, tmp_path: Path) -> None:
    arguments = ["--user", ANN, "--table", "public.odd", "--key", "1"]
    result = run("why", *arguments, folder=tmp_path, environment=environment(why.database, BRIDGE_TABLES="public.odd"))
    assert (result.returncode, result.stderr) == (1, "")
    assert result.stdout.splitlines()[-1] == "DIFFERENT the bridge shows this row, and Postgres does not"
    document = why.json(*arguments, status=1)
    assert (document["bridge"]["live"], document["postgres"]["visible"], document["differ"]) == (True, False, True)


def test_what_postgres_shows_and_the_bridge_does_not_is_told_with_the_reason(why: Why) -> None:
    status, out, _ = why("--user", ANN, "--table", "public.plain", "--key", "1")
    assert status == 1
    assert out.splitlines()[-3:] == [
        "bridge    shows nothing of the table: public.plain has no row-level security, and BRIDGE_POLICIES has no rule "
        "for it",
        "Postgres  shows it",
        "DIFFERENT Postgres shows this row, and the bridge does not",
    ]


def test_a_rule_is_not_compared_with_the_policies_that_it_replaces(why: Why) -> None:
    arguments = ["--user", ANN, "--table", "public.papers", "--key", "org=8,name="]
    status, out, _ = why(*arguments, BRIDGE_POLICIES='{"public.papers": "org > 1"}')
    assert status == 0
    assert out.splitlines()[1:3] == [
        "policy    BRIDGE_POLICIES (permissive) is TRUE, by row",
        "          TRUE    row       org > 1",
    ]
    assert out.splitlines()[-2:] == [
        "bridge    shows it, by row",
        "Postgres  does not show it, by policies that BRIDGE_POLICIES replaces",
    ]


# -- what cannot be explained ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--table", "public.papers", "--key", "org=9,name="], 1, "there is no row of public.papers with that key"),
        (["--table", "public.missing", "--key", "1"], 1, "there is no table public.missing"),
        (["--table", "public.keyless", "--key", "1"], 1, "public.keyless has no primary key by which to name a row"),
        (["--table", "public.posts", "--key", "1"], 2, "public.posts is not one of BRIDGE_TABLES"),
        (["--table", "public.papers", "--key", "1"], 2, "the primary key is of several columns: org=…,name=…"),
        (["--table", "public.papers", "--key", "org=x,name="], 2, "Postgres refused the values (SQLSTATE 22P02)"),
        (["--table", "public.plain", "--key", "1", "--role", "editor"], 2, "editor is not one of BRIDGE_ROLES"),
        (["--table", "public.plain", "--key", "1", "--claims", "[1]"], 2, "not a JSON object"),
        (["--table", "public.plain", "--key", "1", "--claims", '{"role": "anon"}'], 2, "have options of their own"),
        (["--table", "public.plain", "--key", "1", "--role", "nobody_has_it"], 1, "the role may not be used"),
    ],
)
def test_what_cannot_be_explained_is_told_in_one_sentence(
    arguments: list[str], status: int, message: str, why: Why
) -> None:
    with psycopg.connect(why.database, autocommit=True) as connection:
        connection.execute("create table keyless (id int)")
    tables = "public.papers,public.plain,public.missing,public.keyless"
    code, out, err = why(
        "--user", ANN, *arguments, BRIDGE_TABLES=tables, BRIDGE_ROLES="anon,authenticated,nobody_has_it"
    )
    assert (code, out) == (status, "")
    assert message in " ".join(err.replace("│", "").split())


def test_a_login_role_that_may_not_read_every_row_is_told_so(why: Why) -> None:
    with psycopg.connect(why.database, autocommit=True) as connection:
        connection.execute("grant select on papers to authenticator")
    address = urlsplit(why.database)
    login = address._replace(netloc=f"authenticator@{address.netloc.partition('@')[2]}").geturl()
    status, out, err = why("--user", ANN, "--table", "public.papers", "--key", "org=1,name=a,b=c", DATABASE_URL=login)
    assert (status, out) == (1, "")
    assert "the role of DATABASE_URL may not read every row of public.papers: it needs SELECT, and BYPASSRLS" in err
