"""One head serves all tests of this folder that need a cluster."""

from collections.abc import Iterator

import pytest

from tests.cluster_jobs.head import Head, running_head


@pytest.fixture(scope="package")
def head() -> Iterator[Head]:
    with running_head() as head:
        yield head
