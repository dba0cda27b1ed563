# SPDX-License-Identifier: Apache-2.0
"""For tests on a GPU that is lent for minutes."""

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Say at once why a test failed: pytest would at the end, which a run that is cut short does not reach."""
    if report.failed:
        print(f"\n{report.longreprtext}", flush=True)
