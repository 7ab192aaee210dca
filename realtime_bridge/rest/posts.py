"""The sample REST resource, `public.posts`: every request as the caller, in one transaction, so that RLS decides.

Postgres makes the JSON itself (`row_to_json` under `TimeZone = UTC`), so a row reads the same here as in a live
message, to the last digit of its timestamps. Functions carry their schema: the caller's search path holds schemas in
which others may be able to make one that fits better.

Layer: edges. May import: claims, errors, database, rest.problems.
"""

from collections.abc import Awaitable, Callable
from typing import Annotated, Final

from fastapi import APIRouter, Depends, Path, Query, Response, status
from fastapi.security import HTTPBearer
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints, model_validator

from realtime_bridge.claims import Claims
from realtime_bridge.database import Connection, Database
from realtime_bridge.errors import ForbiddenError, NotFoundError
from realtime_bridge.rest.problems import ProblemRoute

POSITION_HEADER: Final = "Realtime-Position"

_LIST: Final = """
select id, pg_catalog.row_to_json(posts)::text as row
from public.posts where $1::bigint is null or id > $1 order by id limit $2
"""
_GET: Final = "select pg_catalog.row_to_json(posts)::text from public.posts where id = $1"
_INSERT: Final = """
insert into public.posts (user_id, title, body, is_public) values (auth.uid(), $1, $2, $3)
returning pg_catalog.row_to_json(posts)::text
"""
_UPDATE: Final = """
update public.posts
set title = coalesce($2, title), body = coalesce($3, body), is_public = coalesce($4, is_public)
where id = $1 returning pg_catalog.row_to_json(posts)::text
"""
_DELETE: Final = "delete from public.posts where id = $1 returning id"

Identifier = Annotated[int, Path(ge=-(2**63), lt=2**63)]
Title = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\x00]*$")]
Body = Annotated[str, StringConstraints(max_length=100_000, pattern=r"^[^\x00]*$")]


class NewPost(BaseModel):
    """What the author of a post says; the rest is Postgres' to fill in."""

    model_config = ConfigDict(extra="forbid", strict=True)

    title: Title
    body: Body = ""
    is_public: bool = False


class PostChange(BaseModel):
    """The columns to change; what is left out stays."""

    model_config = ConfigDict(extra="forbid", strict=True)

    title: Title | None = None
    body: Body | None = None
    is_public: bool | None = None

    @model_validator(mode="after")
    def _says_something(self) -> "PostChange":
        if not self.model_fields_set:
            raise ValueError("name at least one of title, body, is_public")
        if any(getattr(self, name) is None for name in self.model_fields_set):
            raise ValueError("no column of a post may be null")
        return self


class Post(BaseModel):
    """A post as it is answered; tables with more columns answer those too."""

    id: int
    user_id: str
    title: str
    body: str
    is_public: bool
    created_at: AwareDatetime = Field(examples=["2026-01-02T03:04:05.678901+00:00"])
    updated_at: AwareDatetime


def posts_router(
    database: Callable[[], Database],
    verifier_dependency: Callable[..., Awaitable[Claims]],
    position: Callable[[Claims], Awaitable[str]],
    route_class: type[ProblemRoute] = ProblemRoute,
) -> APIRouter:
    """The routes of `/posts`.

    Args:
        database: the primary; asked for with every request, since routes exist before a lifespan begins.
        verifier_dependency: gives the caller's claims, as `auth.require_claims` makes one.
        position: where this process stands in the history, for a caller. It is asked before a read's transaction
            begins, so that the read shows at least everything up to there, and following from there misses nothing.
        route_class: of every route.
    """
    router = APIRouter(
        prefix="/posts", tags=["posts"], route_class=route_class, dependencies=[Depends(HTTPBearer(auto_error=False))]
    )
    Caller = Annotated[Claims, Depends(verifier_dependency)]  # noqa: N806  (a type, if a local one)

    @router.get("", response_model=list[Post])
    async def read_posts(
        claims: Caller,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        after: Annotated[int | None, Query(ge=-(2**63), lt=2**63)] = None,
    ) -> Response:
        """Read the posts that the caller may see, in the order of their ids, a page at a time."""
        headers = {POSITION_HEADER: await position(claims)}
        async with database().transaction_as(claims, readonly=True) as connection:
            rows = await connection.fetch(_LIST, after, limit + 1)
        if len(rows) > limit:
            rows.pop()
            headers["Link"] = f'<?limit={limit}&after={rows[-1]["id"]}>; rel="next"'
        return _json(f"[{','.join(row['row'] for row in rows)}]", headers=headers)

    @router.post("", response_model=Post, status_code=status.HTTP_201_CREATED)
    async def create_post(claims: Caller, post: NewPost) -> Response:
        """Write a post as the caller."""
        async with database().transaction_as(claims) as connection:
            row = await connection.fetchval(_INSERT, post.title, post.body, post.is_public)
        return _json(row, status.HTTP_201_CREATED)

    @router.get("/{id}", response_model=Post)
    async def read_post(claims: Caller, id: Identifier) -> Response:  # noqa: A002  (the name in the address)
        """Read one post, if the caller may see it."""
        headers = {POSITION_HEADER: await position(claims)}
        async with database().transaction_as(claims, readonly=True) as connection:
            row = await connection.fetchval(_GET, id)
        if row is None:
            raise NotFoundError("there is no such post")
        return _json(row, headers=headers)

    @router.patch("/{id}", response_model=Post)
    async def change_post(claims: Caller, id: Identifier, change: PostChange) -> Response:  # noqa: A002
        """Change some columns of a post."""
        async with database().transaction_as(claims) as connection:
            row = await connection.fetchval(_UPDATE, id, change.title, change.body, change.is_public)
            if row is None:
                await _explain(connection, id)
        return _json(row)

    @router.delete("/{id}", status_code=status.HTTP_204_NO_CONTENT)
    async def delete_post(claims: Caller, id: Identifier) -> None:  # noqa: A002
        """Delete a post."""
        async with database().transaction_as(claims) as connection:
            if await connection.fetchval(_DELETE, id) is None:
                await _explain(connection, id)

    return router


async def _explain(connection: Connection, post: int) -> None:
    """Say why a write met no row.

    Raises:
        ForbiddenError: the caller may see the post.
        NotFoundError: it may not, or there is none.
    """
    if await connection.fetchval(_GET, post) is None:
        raise NotFoundError("there is no such post")
    raise ForbiddenError("the post is not yours to change")


def _json(text: str, status_code: int = status.HTTP_200_OK, *, headers: dict[str, str] | None = None) -> Response:
    return Response(text, status_code, headers, media_type="application/json")
