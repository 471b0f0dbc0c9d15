"""The state machine of the unit tests, for longer."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

from tests.unit.test_any_order import AnyOrder


@pytest.mark.slow
@pytest.mark.timeout(1800)
class TestAnyOrderForLonger(AnyOrder.TestCase):  # type: ignore[misc, name-defined]
    settings = settings(
        max_examples=3000, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
    )
