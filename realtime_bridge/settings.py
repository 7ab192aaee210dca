"""Everything an operator can choose, read once from the environment or a `.env` file.

Layer: words.
Sources: the table of settings in docs/operations.md is printed from here by `make docs`.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import orjson
from dotenv import dotenv_values
from pydantic import (
    AliasChoices,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SecretStr,
    ValidationError,
    field_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from realtime_bridge.errors import ConfigurationError

_PREFIX = "BRIDGE_"

_ORIGIN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/?#@*\s]+/?")
"""What a browser may send as `Origin`, with the slash that people add; `https://*.host` it never sends."""

CommaSeparated = Annotated[tuple[str, ...], NoDecode]


def _foreign(name: str) -> AliasChoices:
    """A variable that the ecosystem already has: it keeps its name."""
    return AliasChoices(name.upper(), name)


class Settings(BaseSettings):
    """Everything an operator can choose.

    Build it with `Settings.load()`, which turns what is wrong into a `ConfigurationError`.
    """

    model_config = SettingsConfigDict(
        env_prefix=_PREFIX,
        frozen=True,
        extra="ignore",
        populate_by_name=True,
        env_ignore_empty=True,
        allow_inf_nan=False,
    )

    supabase_url: str | None = Field(None, validation_alias=_foreign("supabase_url"), description="Project address.")
    supabase_key: SecretStr | None = Field(
        None, validation_alias=_foreign("supabase_key"), description="Service key (secret or service_role)."
    )
    supabase_jwt_secret: SecretStr | None = Field(
        None,
        validation_alias=_foreign("supabase_jwt_secret"),
        description="HS256 secret; without it tokens are verified by the project's JWKS.",
    )
    supabase_jwks_url: str | None = Field(
        None, validation_alias=_foreign("supabase_jwks_url"), description="Where the public keys are."
    )
    database_url: SecretStr | None = Field(
        None,
        validation_alias=_foreign("database_url"),
        description="Postgres: policies, `/posts`, and the `postgres` source.",
    )
    redis_url: SecretStr | None = Field(
        None,
        validation_alias=_foreign("redis_url"),
        description="The shared broker; without it the history is kept in memory, by one process.",
    )

    source: Literal["postgres", "supabase"] | None = Field(
        None, description="Where changes come from: `supabase` if SUPABASE_URL is set, else `postgres`."
    )
    tables: CommaSeparated = Field(("public.posts",), description="Comma-separated `schema.table`.")
    policies: Annotated[dict[str, str], NoDecode] = Field(
        {}, description="JSON object, table → SQL expression, used instead of the database's own policies."
    )
    publication: str = Field("realtime_bridge", description="`postgres` source: the publication to read.")
    slot: str = Field("realtime_bridge", description="`postgres` source: the replication slot to read.")
    slot_bytes: PositiveInt = Field(
        4 * 2**30, description="WAL that Postgres may keep for the slot; beyond it the slot is given up as a gap."
    )
    namespace: str = Field(
        "realtime-bridge", pattern=r"^[A-Za-z0-9_.:-]{1,40}$", description="Prefix of every Redis key."
    )
    history_size: PositiveInt = Field(100_000, description="Changes that can be resumed from.")
    history_bytes: PositiveInt = Field(256 * 2**20, description="Bytes of history, encoded.")
    history_seconds: PositiveFloat = Field(86_400, description="Age of the oldest change kept.")
    transaction_rows: PositiveInt = Field(
        10_000, description="A transaction of more changes is told as one `resync` per table instead."
    )
    roles: CommaSeparated = Field(("anon", "authenticated"), description="Roles that may connect.")
    allowed_origins: CommaSeparated = Field(
        (), description="Comma-separated origins of pages besides the same host's; `*` allows all."
    )
    token_in_query: bool = Field(True, description="Accept `?token=`.")
    audience: str = Field("authenticated", description="Required `aud`; not asked of role `anon`.")
    issuer: str | None = Field(
        None, description="Required `iss`, if set; not asked of a legacy anon key (`iss` `supabase`)."
    )
    max_connections: PositiveInt = Field(20_000, description="Connections per process.")
    max_connections_per_user: PositiveInt = Field(20, description="Connections per `sub`.")
    send_buffer_bytes: PositiveInt = Field(
        65_536, description="Bytes a connection may owe before it falls behind and is read from history."
    )
    ping_seconds: PositiveFloat = Field(25, description="A ping after so many idle seconds.")
    drain_seconds: PositiveFloat = Field(10, description="Time to let clients go when stopping.")
    takeover_seconds: PositiveFloat = Field(5, description="A dead leader is replaced within this time.")
    resync_seconds: PositiveFloat = Field(
        10, description="At most one `resync` per subscription and table in this time."
    )
    fact_seconds: NonNegativeFloat = Field(
        5, description="Time to live of facts that cannot be followed; 0: asked each time."
    )
    row_index_bytes: PositiveInt = Field(
        256 * 2**20, description="Bytes of the row index, which knows old rows that the source does not bring."
    )
    repair_column: str = Field(
        "updated_at",
        description="Column that changes with every change of a row; tables that have it are repaired after a gap.",
    )
    repair_rows: NonNegativeInt = Field(
        10_000, description="A table of more rows is not repaired after a gap, but told as one `resync`."
    )
    canary_table: str | None = Field(
        None,
        description="`supabase` source: table of columns `id` and `beat`, written to prove that changes arrive.",
    )
    supabase_deletes: bool = Field(False, description="Send DELETE keys to everyone, as Supabase does.")
    admin_token: SecretStr | None = Field(None, description="Guards `/admin/*` and, outside `dev`, the page.")

    @field_validator("tables", "roles", "allowed_origins", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("tables")
    @classmethod
    def _schema_and_table(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for table in value:
            _require_schema(table)
        if not value:
            raise ValueError("at least one table is needed")
        return tuple(dict.fromkeys(value))

    @field_validator("allowed_origins")
    @classmethod
    def _origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            if origin not in ("*", "null") and not _ORIGIN.fullmatch(origin):
                raise ValueError(f"{origin!r} is not of the form https://host or https://host:port")
        return value

    @field_validator("canary_table")
    @classmethod
    def _one_table(cls, value: str | None) -> str | None:
        if value is not None:
            _require_schema(value)
        return value

    @field_validator("policies", mode="before")
    @classmethod
    def _json_object(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        try:
            parsed = orjson.loads(value)
        except orjson.JSONDecodeError as error:
            raise ValueError(f"not JSON ({error.msg} at character {error.pos})") from None
        if not isinstance(parsed, dict) or not all(isinstance(rule, str) for rule in parsed.values()):
            raise ValueError("not a JSON object of table → SQL expression")
        return parsed

    @field_validator("slot", "publication")
    @classmethod
    def _identifier(cls, value: str) -> str:
        if not (value.isidentifier() and value.isascii() and value == value.lower() and len(value) <= 63):
            raise ValueError("use lower-case letters, digits and underscores")
        return value

    @property
    def source_kind(self) -> Literal["postgres", "supabase"]:
        """Where changes come from, decided."""
        return self.source or ("supabase" if self.supabase_url else "postgres")

    @classmethod
    def load(cls, *, env_file: Path | None = Path(".env"), whole: bool = True, **fields: Any) -> Self:
        """Read the environment and `.env`; the environment wins. What is not `whole` need not suffice to serve.

        Raises:
            ConfigurationError: one sentence that names the variable.
        """
        file = env_file if env_file is not None and env_file.is_file() else None
        values = dict(dotenv_values(file)) if file else {}
        _refuse_unknown({**values, **os.environ})
        try:
            settings = cls(_env_file=file, **fields)
        except ValidationError as error:
            raise ConfigurationError(_sentence(error)) from None
        if whole:
            settings.require()
        return settings

    def require(self) -> None:
        """Refuse what cannot work together.

        Raises:
            ConfigurationError: one sentence that names the variable.
        """
        if self.source_kind == "postgres" and self.database_url is None:
            raise ConfigurationError(
                "DATABASE_URL is missing: the postgres source reads it (or set SUPABASE_URL and SUPABASE_KEY)."
            )
        if self.source_kind == "supabase" and (self.supabase_url is None or self.supabase_key is None):
            missing = "SUPABASE_URL" if self.supabase_url is None else "SUPABASE_KEY"
            raise ConfigurationError(f"{missing} is missing: the supabase source needs it.")
        if self.supabase_jwt_secret is None and self.supabase_jwks_url is None and self.supabase_url is None:
            raise ConfigurationError("SUPABASE_JWT_SECRET is missing: no token could be verified.")
        if self.canary_table in self.tables:
            raise ConfigurationError("BRIDGE_CANARY_TABLE is one of BRIDGE_TABLES: it must be a table of its own.")
        if self.database_url is None and (left := [t for t in self.tables if t not in self.policies]):
            raise ConfigurationError(
                f"BRIDGE_POLICIES has no rule for {left[0]}, and there is no DATABASE_URL to read policies from."
            )


def _require_schema(table: str) -> None:
    if len([part for part in table.split(".") if part]) != 2:
        raise ValueError(f"{table!r} is not of the form schema.table")


def _refuse_unknown(environment: Mapping[str, str | None]) -> None:
    known = {_PREFIX + name.upper() for name, field in Settings.model_fields.items() if not field.validation_alias}
    for name in sorted(environment):
        if name.upper().startswith(_PREFIX) and name.upper() not in known:
            raise ConfigurationError(f"{name} is not a setting of this bridge.")


def _sentence(error: ValidationError) -> str:
    first = error.errors(include_input=False, include_url=False)[0]
    field = str(first["loc"][0]) if first["loc"] else ""
    known = Settings.model_fields.get(field.lower())
    variable = field.upper() if known is None or known.validation_alias else _PREFIX + field.upper()
    reason = first["msg"].removeprefix("Value error, ")
    return f"{variable}: {reason[:1].lower()}{reason[1:]}."


def describe() -> str:
    """Every setting as a Markdown table, for docs/operations.md."""
    lines = ["| variable | default | meaning |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        variable = name.upper() if field.validation_alias else _PREFIX + name.upper()
        default = ",".join(field.default) if isinstance(field.default, tuple) else field.default
        shown = "-" if default in (None, "", {}) else f"`{default}`"
        lines.append(f"| `{variable}` | {shown} | {field.description} |")
    return "\n".join(lines)
