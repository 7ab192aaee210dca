"""Rights that a test sets by hand."""

from collections.abc import Mapping


class Known:
    """What a process knows of rights, and whether Postgres would tell it something else."""

    def __init__(self, **rights: str) -> None:
        self.rights: Mapping[str, str] = {f"public.{table}": digest for table, digest in rights.items()}
        self.is_outdated = False
        self.asked = 0

    async def outdated(self) -> bool:
        self.asked += 1
        return self.is_outdated
