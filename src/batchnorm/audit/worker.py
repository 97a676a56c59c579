"""The process that runs the checks of one peer, and prints a line of JSON for each.

``python -m batchnorm.audit.worker FILE NAME SKIP`` leaves out the first SKIP checks. What the framework
prints goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

from batchnorm.audit.adapters import load
from batchnorm.testing.checking import applicable, implementation_of, run, validate_expected


def main(file: str, name: str, skip: str) -> None:
    """Announce the peer, then each check and its record."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)

        def say(**line: Any) -> None:
            print(json.dumps(line), file=out, flush=True)

        warnings.simplefilter("ignore")
        try:
            given = load(Path(file))[1](name)
        except ImportError as error:
            say(missing=str(error))
            return
        except Exception as error:  # of any framework
            say(broken=f"{type(error).__name__}: {error}")
            return
        versions, expected = given.pop("versions", {}), given.pop("expected_failures", None)
        expected = validate_expected(expected)
        implementation = implementation_of(**given)
        checks = list(applicable(implementation))
        say(ready=checks, versions=versions, expected=expected)
        for check, parameters in checks[int(skip) :]:
            say(record=run(implementation, check, parameters, expected.get(check, ""))._asdict())
    os._exit(0)  # some frameworks hang, or crash, at the end


def _end_with_parent() -> None:
    os.read(0, 1)  # not of sys.stdin, whose lock would be held at the end
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    main(*sys.argv[1:])
