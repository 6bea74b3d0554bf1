"""The plugin of pytest for part a: it leaves out the tests that are done, and reports each result as an event."""

from typing import Any

import pytest

from gpu.order import Order

LIMIT = 150.0  # seconds of one test; compiling takes most

ORDER = Order.received()


def _name(nodeid: str) -> str:
    return nodeid.removeprefix("tests/gpu/")


def pytest_collection_finish(session: pytest.Session) -> None:
    """List all tests, then leave out those that are done."""
    if ORDER:
        ORDER.emit(names=[_name(item.nodeid) for item in session.items])
        session.items[:] = [item for item in session.items if _name(item.nodeid) not in ORDER.skip]


def pytest_runtest_logstart(nodeid: str) -> None:
    if ORDER:
        ORDER.emit(start=_name(nodeid), limit=LIMIT)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Any:
    report = yield
    if ORDER and (report.when == "call" or not report.passed):
        status = {"passed": "ok", "failed": "failed", "skipped": "skipped"}[report.outcome]
        result: dict[str, Any] = {"status": status, **dict(report.user_properties)}
        if report.failed:
            result |= {
                "error": " ".join(str(call.excinfo.value).split())[:500],
                "traceback": report.longreprtext[-8000:],
            }
        elif report.skipped:
            result["reason"] = str(call.excinfo.value)
        ORDER.emit(name=_name(item.nodeid), seconds=round(report.duration, 2), **result)
        if report.failed:
            _stop_if_spoilt(item.session)
    return report


def _stop_if_spoilt(session: pytest.Session) -> None:
    """End the process after an error that leaves its CUDA context unusable; the rest runs in another one."""
    import torch

    if torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            session.shouldstop = f"the GPU's context is lost: {error}"
