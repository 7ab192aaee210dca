"""The text by which Postgres is asked: what it holds, and that no SQL in it can end it."""

import pytest

from realtime_bridge.policy.blocks import (
    Condition,
    Declared,
    Section,
    answers_block,
    facts_block,
    identifier,
    in_array,
    literal,
    types_block,
)

PATH = "public, pg_temp"
SECTIONS = [Section("anon"), Section("it's", prepares=True)]
ODD = ["'$$ $b$'", '"b"', "'\\'", "a\n-- b"]


def condition(sql: str) -> Condition:
    return Condition(sql, 'do"cs', {'co"l': Declared("text[]", '"C"'), "b": Declared("uuid")})


@pytest.mark.parametrize("sql", ODD)
def test_a_block_is_quoted_by_a_word_that_nothing_in_it_holds(sql: str) -> None:
    for block in (
        facts_block(SECTIONS, [sql], PATH),
        answers_block(SECTIONS, [condition(sql)], PATH),
        types_block(["none"], [sql], PATH),
    ):
        tag = block.split("$")[1]
        assert block.startswith(f"do ${tag}$")
        assert block.endswith(f"${tag}$")
        assert block.count(f"${tag}$") == 2
        assert tag not in sql
        assert sql in block


def test_the_word_is_the_contents_own() -> None:
    blocks = {
        facts_block(SECTIONS, ["a"], PATH),
        facts_block(SECTIONS, ["b"], PATH),
        facts_block(SECTIONS[:1], ["a"], PATH),
        facts_block(SECTIONS, ["a"], "auth"),
        answers_block(SECTIONS, [condition("a")], PATH),
    }
    assert len({block.split("$")[1] for block in blocks}) == len(blocks)
    assert facts_block(SECTIONS, ["a"], PATH) in blocks


def test_names_and_texts_stay_names_and_texts() -> None:
    assert (identifier('a"b'), literal("it's")) == ('"a""b"', "'it''s'")
    block = answers_block(SECTIONS, [condition("true")], PATH)
    for part in ('<<"do""cs">>', '"co""l" text[] collate "C" := ', "set_config('role', 'it''s', true)"):
        assert part in block


def test_a_value_is_taken_in_as_the_one_element_of_an_array() -> None:
    assert in_array('a"\\,{}', "text") == '{"a\\"\\\\,{}"}'
    assert in_array("NULL", "text") == '{"NULL"}'
    assert in_array(None, "text") is None
    assert in_array("{a,b}", "text[]") == "{a,b}"
