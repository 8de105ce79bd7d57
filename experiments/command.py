"""What all command lines end with."""

import os
import sys
from collections.abc import Callable
from typing import NoReturn


def run_command(main: Callable[[], int]) -> NoReturn:
    """Runs a command line and exits with what it returns, or with 130 if it is interrupted."""
    try:
        status = main()
    except KeyboardInterrupt:
        print("\ninterrupted; what was finished is kept, and the same command can be given again", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(130)  # the compiler's threads may be at work, and would crash an orderly exit
    sys.exit(status)
