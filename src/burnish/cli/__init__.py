"""The command line: one file a verb, `show` for everything a person sees. Nothing here loads a framework for
`--help`.
"""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Entry point of `burnish`. Every error a person can put right is a sentence and an exit code, never a
    traceback.
    """
    from burnish.cli.app import app
    from burnish.cli.failures import exit_code_of, language_asked
    from burnish.errors import EXIT_FAILED
    from burnish.machine.diagnosis import language_of

    language = language_of(os.environ)
    try:
        language, arguments = language_asked(sys.argv[1:], language)
        app(arguments)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(EXIT_FAILED)
    except Exception as e:  # the one place: whatever there is to say is said, and what is known of it
        sys.exit(exit_code_of(e, language))
