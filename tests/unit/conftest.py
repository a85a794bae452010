"""What unit tests share: nothing is measured or converted in processes of its own, each of which would import torch."""

import pytest

from deployments import aside


@pytest.fixture(autouse=True, scope="session")
def inline() -> None:
    aside.INLINE = True
