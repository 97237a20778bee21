"""``mixjax fit FORMULA DATA``, ``mixjax power FORMULA ...`` and ``mixjax trial ...``: the main jobs from a shell.

An error is a line on stderr and an exit status, never a traceback: ``--debug`` shows it.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import traceback
import warnings
from collections.abc import Sequence

from mixjax.cli.arguments import parser_of_commands
from mixjax.cli.messages import explained, tell

UNTRUSTED = "MIXJAX_UNTRUSTED"
NO_RESULT, INTERRUPTED, NO_READER = 2, 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        exit status: 0 done, 1 not converged, 2 no result (bad input or an error), 130 interrupted, 141 nobody reads
        the output any more, as a shell has it of other programs.
    """
    arguments = parser_of_commands().parse_args(_with_negative_numbers(sys.argv[1:] if argv is None else argv))
    with contextlib.suppress(AttributeError):  # a name that the terminal cannot show is no reason to show nothing
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    before = os.environ.get(UNTRUSTED)
    try:
        if arguments.untrusted:
            os.environ[UNTRUSTED] = "1"
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: tell(message)
            status: int = arguments.run(arguments)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # Python flushes once more at its end, and would complain then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NO_READER
    except KeyboardInterrupt:
        tell("interrupted")
        return INTERRUPTED
    except Exception as error:
        if arguments.debug:
            traceback.print_exc()
        print(f"mixjax: {explained(error)}", file=sys.stderr)
        return NO_RESULT
    finally:
        if before is None:
            os.environ.pop(UNTRUSTED, None)
        else:
            os.environ[UNTRUSTED] = before


def _with_negative_numbers(argv: Sequence[str]) -> list[str]:
    """``--beta -1,0.3`` as ``--beta=-1,0.3``: argparse takes what begins with a dash for an option."""
    joined: list[str] = []
    for text in argv:
        if joined and re.match(r"--\w[\w-]*$", joined[-1]) and re.match(r"-\.?\d", text):
            joined[-1] += f"={text}"
        else:
            joined.append(text)
    return joined
