"""The suite's command-line option: pytest takes options from installed plugins, not from the
conftest of a package that ``--pyargs`` names. It adds the option and does nothing else.
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
