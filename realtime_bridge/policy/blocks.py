"""Writes the blocks of PL/pgSQL by which Postgres is asked many things about many users in one statement.

A block's text names what is asked, and nothing of a user or a row: those it takes from one setting, and it leaves its
answers in another. So it is the same from call to call, and neither a log nor pg_stat_statements is shown any data.

- What comes in is read before any user's role is taken.
- Each user is asked about in a subtransaction that is always rolled back. With it go the role, the claims, and whatever
  a policy's function has set, so that nothing of one user meets the next.
- Each question stands in an exception block: what fails is that answer alone.
- Each role has expressions of its own: whether it may call a function is asked once and kept with the plan.
- A policy may call functions of a schema that its reader may not use: their names were resolved when it was made. For
  such a role the block *prepares*: first comes nobody, in the role that the block was begun in, for whom every name is
  resolved and nothing is evaluated. (Where an expression reads a table under row security, Postgres resolves its names
  again for the role, and there the privilege is needed.)

Layer: pure. May import: nothing of ours.
Sources: pl_exec.c (exec_eval_simple_expr, exec_stmt_block), plancache.c (RevalidateCachedQuery), guc.c (AtEOXact_GUC).
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

INPUT: Final = "realtime_bridge.asked"
OUTPUT: Final = "realtime_bridge.answers"

VALUE: Final = ":"
FAILURE: Final = "!"
"""How an answer begins: a value's text follows, or the SQLSTATE of an error. The empty answer is NULL."""

TRUE: Final = "t"
FALSE: Final = "f"
"""A truth value's text."""

TOO_LONG: Final = "54000"
MAX_BYTES: Final = 1 << 20
"""A longer value fails with `TOO_LONG`."""

MAX_TOTAL: Final = 1 << 24
"""After so many bytes of values the block ends: whoever has not been reached by then has no answer."""


_END: Final = """perform pg_catalog.set_config('role', 'none', true);
perform pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
"""

_UNDO: Final = "BRDGE"
"""Raised to roll back what one user's questions have done."""

_SETTINGS: Final = {
    "request.jwt.claims": "claims",
    "request.jwt.claim": "claims",
    "request.jwt.claim.sub": "sub",
    "request.jwt.claim.role": "role",
    "request.jwt.claim.email": "email",
}


class Section(NamedTuple):
    """The users of one role, before whom nobody stands: somebody whose claims are null."""

    role: str
    prepares: bool = False


class Declared(NamedTuple):
    """A column as it is declared: type with modifier, and collation if it is not the type's own, both as SQL."""

    type: str
    collation: str = ""


class Condition(NamedTuple):
    """A boolean expression over columns of one row; within sub-selects they may be written with the table's name."""

    sql: str
    table: str
    columns: Mapping[str, Declared]


def facts_block(sections: Sequence[Section], queries: Sequence[str], search_path: str) -> str:
    """Evaluates each query for each user: the answers are one user's after the other's, in the order of the queries.

    The input is an object. `claims`, `sub`, `role` and `email` hold a text for each user; users stand in the order of
    the sections. `ends` holds the number of each section's last user. All numbers count from 1.
    """
    tag = _tag(sections, queries, search_path)
    count = len(queries)

    def ask(section: Section) -> str:
        return "".join(
            _query(tag, section, sql, f"({tag}_user - 1) * {count} + {i}") for i, sql in enumerate(queries, 1)
        )

    return _Block(
        tag,
        variables=f"{tag}_answers text[] := array_fill(null::text, array[{count} * cardinality({tag}_claims)]);\n",
        own=f"({tag}_user - 1) * {count} + 1 .. {tag}_user * {count}",
    ).written(sections, search_path, ask)


def answers_block(sections: Sequence[Section], conditions: Sequence[Condition], search_path: str) -> str:
    """Decides questions, which stand in the order of their users, and for one user in that of their conditions.

    The input is that of `facts_block` and more. `lasts` holds the number of each user's last question; `conditions`
    and `rows` hold the number of each question's condition, and of the row among the condition's; `values` holds, for
    each condition and each of its columns, the text of each row, as `in_array` writes it.
    """
    tag = _tag(sections, conditions, search_path)
    variables = [_numbers(tag, name) for name in ("lasts", "conditions", "rows")]
    variables += [
        _texts(tag, f"{i}_{j}", f"values,{i - 1},{j}")
        for i, condition in enumerate(conditions, 1)
        for j in range(len(condition.columns))
    ]
    variables.append(f"{tag}_answers text[] := array_fill(null::text, array[cardinality({tag}_conditions)]);\n")
    variables.append(f"{tag}_at int4;\n{tag}_truth bool;\n")

    def ask(section: Section) -> str:
        return "".join(_condition(tag, section, condition, i) for i, condition in enumerate(conditions, 1))

    return _Block(
        tag,
        variables="".join(variables),
        own=f"{tag}_at .. {tag}_lasts[{tag}_user]",
        begin=f"{tag}_at := coalesce({tag}_lasts[{tag}_user - 1], 0) + 1;\n",
    ).written(sections, search_path, ask)


def types_block(roles: Sequence[str], queries: Sequence[str], search_path: str) -> str:
    """Finds out what each query is without evaluating it, in the first of the roles that may use its names.

    The answers are two for each query: the OID of its type, and that of its collation. What is none has none.
    """
    tag = _tag(roles, queries, search_path)
    named = "".join(_typed(tag, sql, 2 * i + 1) for i, sql in enumerate(queries))
    return f"""do ${tag}$
declare
{tag}_as text;
{tag}_answers text[] := array_fill(null::text, array[{2 * len(queries)}]);
begin
perform set_config('search_path', {literal(search_path)}, true);
foreach {tag}_as in array array[{", ".join(map(literal, roles))}]::pg_catalog.text[] loop
begin
perform pg_catalog.set_config('role', {tag}_as, true);
{named}exception when others then null;
end;
end loop;
{_END}perform set_config('{OUTPUT}', array_to_json({tag}_answers)::text, true);
end ${tag}$"""


def identifier(name: str) -> str:
    """A name as SQL."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """A text as SQL, where standard_conforming_strings is on."""
    return "'" + text.replace("'", "''") + "'"


def in_array(text: str | None, type_name: str) -> str | None:
    """A column's text as blocks take it in: as an array of that one element, which its type's input function reads.

    A cast from text may be something else; a cast to an array never is, so that an array stays as it is.
    """
    if text is None or type_name.endswith("[]"):
        return text
    return '{"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"}'


def _typed(tag: str, sql: str, place: int) -> str:
    never = f"(select ({sql}\n) where false)"
    collation = f"pg_catalog.to_regcollation(pg_catalog.pg_collation_for({never}))"
    return f"""if {tag}_answers[{place}] is null then
begin
{tag}_answers[{place}] := pg_catalog.pg_typeof({never})::pg_catalog.oid;
{tag}_answers[{place + 1}] := {collation}::pg_catalog.oid;
exception when others then null;
end;
end if;
"""


def _query(tag: str, section: Section, sql: str, place: str) -> str:
    text = f"pg_catalog.concat_ws('{VALUE}', '', ({sql}\n))"
    return f"""begin
{_evaluate(tag, section, text, f"{tag}_text")}{tag}_size := coalesce(pg_catalog.octet_length({tag}_text), 0);
if {tag}_size > {MAX_BYTES} then
{tag}_text := '{FAILURE}{TOO_LONG}';
end if;
{tag}_answers[{place}] := {tag}_text;
{tag}_total := {tag}_total + {tag}_size;
{_failing(tag, place)}end;
"""


def _condition(tag: str, section: Section, condition: Condition, number: int) -> str:
    """`AND TRUE` changes no truth value, but is an error where the expression is not boolean."""
    columns = "".join(
        _column(name, declared, f"{tag}_{number}_{j}[{tag}_rows[{tag}_at]]")
        for j, (name, declared) in enumerate(condition.columns.items())
    )
    place = f"{tag}_at"
    return f"""while {place} <= {tag}_lasts[{tag}_user] and {tag}_conditions[{place}] = {number} loop
begin
<<{identifier(condition.table)}>>
declare
{columns}begin
{_evaluate(tag, section, f"(({condition.sql}{chr(10)}) and true)", f"{tag}_truth")}end;
{tag}_answers[{place}] := case {tag}_truth when true then '{VALUE}{TRUE}' when false then '{VALUE}{FALSE}' else '' end;
{_failing(tag, place)}end;
{place} := {place} + 1;
end loop;
"""


def _column(name: str, declared: Declared, text: str) -> str:
    collation = f" collate {declared.collation}" if declared.collation else ""
    is_array = declared.type.endswith("[]")
    value = f"{text}::{declared.type}" if is_array else f"({text}::{declared.type}[])[1]"
    return f"{identifier(name)} {declared.type}{collation} := {value};\n"


def _evaluate(tag: str, section: Section, expression: str, target: str) -> str:
    if section.prepares:
        return f"select {expression} into {target} where {tag}_claims[{tag}_user] is not null;\n"
    return f"{target} := {expression};\n"


def _failing(tag: str, place: str) -> str:
    return f"""exception
when lock_not_available then raise;
when others or assert_failure then {tag}_answers[{place}] := pg_catalog.concat('{FAILURE}', sqlstate);
"""


class _Block(NamedTuple):
    """What a block is made of besides what it asks.

    Attributes:
        variables: its own variables, where names are still those of pg_catalog.
        own: from which to which the answers are one user's.
        begin: what comes before each user.
    """

    tag: str
    variables: str
    own: str
    begin: str = ""

    def written(self, sections: Sequence[Section], search_path: str, ask: Callable[[Section], str]) -> str:
        tag = self.tag
        users = "".join(self._users(number, section, ask(section)) for number, section in enumerate(sections))
        given = "".join(_texts(tag, name, name) for name in ("claims", "sub", "role", "email"))
        return f"""do ${tag}$
#variable_conflict use_column
declare
{tag}_input constant json := current_setting('{INPUT}');
{given}{_numbers(tag, "ends")}{self.variables}\
{tag}_text text;
{tag}_size int4;
{tag}_total int4 := 0;
{tag}_asked bool;
begin
perform set_config('{INPUT}', '', true), set_config('search_path', {literal(search_path)}, true);
<<{tag}_all>>
begin
{users}end;
{_END}perform set_config('{OUTPUT}', array_to_json({tag}_answers)::text, true);
end ${tag}$"""

    def _users(self, number: int, section: Section, asked: str) -> str:
        tag = self.tag
        first = f"{tag}_ends[{number}] + 1" if number else "1"
        plans = "auto" if section.prepares else "force_generic_plan"
        return f"""perform pg_catalog.set_config('plan_cache_mode', '{plans}', true);
for {tag}_user in {first if section.prepares else f"{first} + 1"} .. {tag}_ends[{number + 1}] loop
{self.begin}{tag}_asked := false;
begin
{self._become(section)}{asked}{tag}_asked := true;
raise sqlstate '{_UNDO}';
exception
when query_canceled or lock_not_available then exit {tag}_all;
when others or assert_failure then
if not {tag}_asked then
for {tag}_i in {self.own} loop
{tag}_answers[{tag}_i] := pg_catalog.concat('{FAILURE}', sqlstate);
end loop;
end if;
end;
exit {tag}_all when {tag}_total > {MAX_TOTAL};
end loop;
"""

    def _become(self, section: Section) -> str:
        """Take the user's claims and role; nobody takes any."""
        tag = self.tag
        settings = [f"pg_catalog.set_config('{name}', {tag}_{of}[{tag}_user], true)" for name, of in _SETTINGS.items()]
        settings.append(f"pg_catalog.set_config('role', {literal(section.role)}, true)")
        become = f"{tag}_text := pg_catalog.concat({', '.join(settings)});\n"
        return f"if {tag}_claims[{tag}_user] is not null then\n{become}end if;\n" if section.prepares else become


def _texts(tag: str, name: str, path: str) -> str:
    return f"{tag}_{name} constant text[] := array(select json_array_elements_text({tag}_input #> '{{{path}}}'));\n"


def _numbers(tag: str, name: str) -> str:
    return f"{tag}_{name} constant int4[] := array(select json_array_elements_text({tag}_input -> '{name}')::int4);\n"


def _tag(*content: object) -> str:
    """A word that the content cannot hold: it begins the names of a block's own variables, and quotes the block."""
    return "b" + hashlib.blake2b(repr(content).encode(errors="backslashreplace"), digest_size=8).hexdigest()
