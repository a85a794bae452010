"""What composed services have in common: any call to them can be followed."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any, ClassVar

from serve.progress import followed


class Service:
    """A deployment that calls models. Its constructor takes the Settings and the handles of all models, by name."""

    max_streams: ClassVar[int] = 0
    """Streams that a replica may have open beside the requests of its lane."""

    async def followed(self, method: str, *arguments: Any, **limits: Any) -> AsyncIterator[Any]:
        """The Progress of a call, then its result."""
        call = getattr(self, method)
        async with contextlib.aclosing(
            followed(lambda following: call(*arguments, **limits, following=following))
        ) as progress:
            async for each in progress:
                yield each
