"""The door: arguments in, exit codes out. 0 done, 2 the user can fix it, 1 a bug, 130 interrupted.

Nothing heavy is imported before a command runs, so help is instant.
"""

import sys
import traceback
import warnings
from collections.abc import Sequence

from cyclopts import CycloptsError
from pydantic import ValidationError

from nampruner.cli.app import app
from nampruner.console import complain, tell
from nampruner.errors import NamPrunerError
from nampruner.options import explain
from nampruner.recipe import Recipe

__all__ = ["call", "main"]


def main() -> None:
    """Run the command line and exit."""
    sys.exit(call(sys.argv[1:]))


def call(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; every error is one message on stderr."""
    try:
        with warnings.catch_warnings():
            _hear_only_ours()
            status = app(list(arguments), exit_on_error=False, print_error=False, verbose=False)
    except CycloptsError as error:
        complain(_message(error))
        return 2
    except NamPrunerError as error:
        complain(str(error))
        return 2
    except KeyboardInterrupt:
        tell("Interrupted. The same command goes on from here.")
        return 130
    except Exception:
        traceback.print_exc()
        return 1
    return status or 0


def _message(error: CycloptsError) -> str:
    """Say what is wrong with the arguments, and where help is."""
    cause = error.__cause__
    if isinstance(cause, ValidationError):
        return explain(cause, Recipe.model_fields, flags=True)
    command = " ".join(["nampruner", *(error.command_chain or ())])
    return f"{error} See {command} --help."


def _hear_only_ours() -> None:
    """Let our own warnings through, as one line each; those of libraries say nothing to a user."""
    warnings.simplefilter("ignore")
    warnings.filterwarnings("default", module=r"nampruner\.")
    warnings.showwarning = lambda message, *_, **__: tell(f"warning: {message}")
