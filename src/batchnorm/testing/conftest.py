"""The `target` and `dtype` of each case, expected failures, and the closing lines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from batchnorm.capabilities import LIBRARIES, gap
from batchnorm.layout import FLOATS
from batchnorm.testing import data
from batchnorm.testing.libraries import BFLOAT16, PARTS, Target, tried

NOT_RUN = pytest.StashKey[dict[str, str]]()
TARGETS = pytest.StashKey[list[Target]]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "operation(name): the row of the capability table it tests")
    config.addinivalue_line("markers", "dtypes(*names): run with these dtypes only")
    config.addinivalue_line("markers", "large: needs 25 million values and up to 2 GB of memory")
    config.addinivalue_line("markers", "slow: left out unless asked for: pytest -m slow")
    config.addinivalue_line("filterwarnings", "error")
    # How ndonnx uses onnx's Python API is not ours to mend.
    config.addinivalue_line("filterwarnings", "ignore::DeprecationWarning:(spox|onnx|ndonnx)")
    named = config.getoption("--array-library")
    present: list[Target] = []
    not_run: dict[str, str] = {}
    for name in named or LIBRARIES:
        usable, missing = tried(name)
        present += usable
        not_run |= missing
    if BFLOAT16 is None:
        not_run["bfloat16 cases"] = "ml_dtypes is not installed"
    config.stash[TARGETS], config.stash[NOT_RUN] = present, not_run


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "target" in metafunc.fixturenames:
        found = metafunc.config.stash[TARGETS]
        for name, layouts in (("array_layout", data.LAYOUTS), ("vector_layout", data.VECTOR_LAYOUTS)):
            if name in metafunc.fixturenames:  # arrays of some libraries lie in one way only
                pairs = [(t, way) for t in found for way in (layouts if t.strided else ["C"])]
                ids = [f"{target}-{way}" for target, way in pairs]
                metafunc.parametrize(("target", name), pairs, ids=ids, indirect=["target"])
                break
        else:
            metafunc.parametrize("target", found, ids=repr, indirect=True)
    if "dtype" in metafunc.fixturenames:
        only = metafunc.definition.get_closest_marker("dtypes")
        wanted = only.args if only else FLOATS
        dtypes = [d for d in wanted if d != "bfloat16" or BFLOAT16 is not None]
        metafunc.parametrize("dtype", dtypes)


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    asked = config.getoption("--array-library")
    if not asked:
        left = [item for item in items if _runs_only_when_asked(item)]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in set(left)]
    met: set[tuple[str, str]] = set()
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        target, dtype = parameters.get("target"), parameters.get("dtype")
        if not isinstance(target, Target):
            continue
        if not asked and target.library in PARTS and not _in_part(item, target, met):
            item.add_marker(pytest.mark.slow)
            part = PARTS[target.library]
            if item.get_closest_marker("large") and (
                target.device_name not in part.devices or parameters.get("axis", 1) != 1
            ):
                where = " and ".join(part.devices) or "no device"
                why = f"large: runs on {where}, channels second, unless asked for"
                item.add_marker(pytest.mark.skip(reason=why))
        marker = item.get_closest_marker("operation")
        operations = [marker.args[0] if marker else None]
        if item.get_closest_marker("large"):
            operations.append("large")
        for operation in operations:
            found = gap(target.library, target.device_name, dtype, operation)
            if found is not None:
                item.add_marker(pytest.mark.xfail(reason=found.why, strict=True, run=found.tried))


def _runs_only_when_asked(item: pytest.Item) -> bool:
    target = item.callspec.params.get("target") if hasattr(item, "callspec") else None
    return (
        isinstance(target, Target)
        and target.library in PARTS
        and (target.device_name in PARTS[target.library].asked)
    )


def _in_part(item: pytest.Item, target: Target, met: set[tuple[str, str]]) -> bool:
    """Whether it is the first case of its test on a device that runs by default."""
    case = (item.nodeid.partition("[")[0], target.device_name)
    if target.device_name not in PARTS[target.library].devices or case in met:
        return False
    met.add(case)
    return True


@pytest.fixture
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    """Return the library and device that a case runs on."""
    found: Target = request.param
    with found.active():
        if "dtype" in request.fixturenames:
            _known_dtype(found, request.getfixturevalue("dtype"))
        yield found


def _known_dtype(target: Target, dtype: str) -> None:
    """Skip a 16-bit dtype that a library outside the table does not have."""
    if target.library not in LIBRARIES and not hasattr(target.xp, dtype):
        pytest.skip(f"{target} has no {dtype}")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    not_run = config.stash.get(NOT_RUN, {})
    if not_run:
        terminalreporter.section("array libraries that were not there")
        for name, why in not_run.items():
            terminalreporter.write_line(f"{name}: {why}")
