"""Checks of how policies are decided: in which way each of them, and for how long what Postgres answers is believed.

Layer: whole. May import: policy, checks.*.
"""

from collections.abc import Collection, Iterable, Sequence

from realtime_bridge.checks.facts import Facts, Table
from realtime_bridge.checks.finding import Outcome, ok, warning
from realtime_bridge.checks.tables import publish, publish_whole
from realtime_bridge.policy.explanation import Alone
from realtime_bridge.policy.expression import Query
from realtime_bridge.policy.keeping import Dependencies, Keeping, References


def evaluation(
    facts: Facts, about: Table, each: Sequence[Alone], references: References, follows: Collection[str]
) -> Outcome | None:
    """What each policy costs, and how old that may be by which it decides.

    Args:
        facts: all of them.
        about: the table.
        each: its policies, decided one by one.
        references: what they reach.
        follows: tables whose changes come through the history.
    """
    counting = [one for one in each if one.policy.roles]
    if not counting:
        return None
    told = "; ".join(f"{one.policy.name} {_how(facts, one, references, follows)}" for one in counting)
    refused = any(one.refused for one in counting)
    return (warning if refused else ok)(f"Who sees rows of {about.name} is evaluated: {told}.")


def _how(facts: Facts, one: Alone, references: References, follows: Collection[str]) -> str:
    if one.refused:
        return f"not at all ({one.refused})"
    reads = [fact.reads for fact in one.predicate.facts if isinstance(fact, Query)]
    reads += [asked.reads for asked in one.predicate.asked]
    believed = _believed([references.dependencies(read, follows) for read in reads], facts.fact_seconds)
    return f"by {', '.join(one.ways)}{believed}" if one.ways else "the same for every row"


def _believed(answers: Iterable[Dependencies], seconds: float) -> str:
    """For how long answers of Postgres are believed; nothing of what follows from the claims."""
    tables: set[str] = set()
    others: set[str] = set()
    for answer in answers:
        match answer.keeping:
            case Keeping.TRACKED:
                tables |= answer.tables
            case Keeping.TIMED:
                others.add(f"believed for {seconds:g} s, since {answer.reason}")
            case Keeping.VOLATILE:
                others.add(f"asked each time, since {answer.reason}")
    told = [f"believed until {' or '.join(sorted(tables))} changes"] if tables else []
    return f" ({'; '.join([*told, *sorted(others)])})" if told or others else ""


def followed(facts: Facts, about: Table, follows: Collection[str]) -> Outcome:
    """Policies may read any table: whether it is noticed when that one changes.

    Args:
        facts: all of them.
        about: a table that policies read.
        follows: tables whose changes come through the history.
    """
    if about.name in follows:
        return ok(f"Policies read {about.name}, and its changes take effect in the order of commits.")
    believed = f"what policies read of it is believed for {facts.fact_seconds:g} s (BRIDGE_FACT_SECONDS)"
    if not facts.owned:
        return warning(f"Changes of {about.name} are not followed with the supabase source: {believed}.")
    told = f"The publication {facts.publication_name} does not carry every change of {about.name}: {believed}."
    if facts.publication is None or not about.exists or (about.published and about.row_filter is None):
        return warning(told)
    if about.published:
        return warning(told, publish_whole(facts, about))
    return warning(told, publish(facts, about))
