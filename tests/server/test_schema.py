"""The API keeps to its description: schemathesis draws requests from it and checks the answers against it."""

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from onevoice.extraction.extractor import Extractor
from onevoice.server.app import create_app
from onevoice.server.service import open_service
from onevoice.server.settings import Limits, Settings

schemathesis = pytest.importorskip("schemathesis")
from schemathesis.specs.openapi.checks import positive_data_acceptance  # noqa: E402

TOKEN = "0123456789abcdef"


@pytest.fixture(scope="module")
def api(extractor: Extractor, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    limits = Limits(max_bytes=100_000, max_seconds=5.0, max_channels=2)
    folder = tmp_path_factory.mktemp("data")
    with open_service(extractor, Settings(folder / "voices", TOKEN, is_local=False, limits=limits)) as service:
        yield schemathesis.openapi.from_asgi("/openapi.json", create_app(service))


def test_answers_keep_to_the_description(api: Any) -> None:
    operations = [result.ok() for result in api.get_all_operations()]
    assert len(operations) > 15
    headers = {"Authorization": f"Bearer {TOKEN}"}
    for operation in operations:

        @settings(
            max_examples=4, deadline=None, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(case=operation.as_strategy())
        def check(case: Any) -> None:
            case.call_and_validate(
                headers=headers, excluded_checks=[positive_data_acceptance]
            )  # bytes are no recordings

        check()
