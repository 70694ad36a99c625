"""The command line: one file a verb, `show` for everything a person sees. Nothing here loads a framework for
`--help`.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of `burnish`. Every error a person can put right is a sentence and an exit code, never a
    traceback.
    """
    from burnish.cli.app import app
    from burnish.cli.failures import exit_code_of

    try:
        app()
    except (
        Exception
    ) as e:  # the one place: what is a person's to mend is said in a sentence, all else is raised
        code = exit_code_of(e)
        if code is None:
            raise
        sys.exit(code)
