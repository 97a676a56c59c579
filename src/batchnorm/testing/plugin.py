"""The suite's command-line option: pytest takes options from installed plugins, not from the
conftest of a package that ``--pyargs`` names. Where it is not given, this does nothing else.
"""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--array-library",
        action="append",
        default=[],
        metavar="NAME",
        help="run the batchnorm conformance suite on this array library: a name of the capability "
        "table or any importable module; may be given more than once (default: the whole table)",
    )


def pytest_configure(config: pytest.Config) -> None:
    for name in config.getoption("--array-library"):
        from batchnorm.testing.libraries import tried

        usable, missing = tried(name)
        if not usable:
            why = "; ".join(f"{target}: {why}" for target, why in missing.items())
            raise pytest.UsageError(f"--array-library: got {name!r}, expected a usable library ({why})")
