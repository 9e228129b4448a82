"""What a message tells the user to type: pip of the Python that runs here, which need not be the shell's."""

import os
import shlex
import shutil
import sys


def python() -> str:
    """How a shell calls this Python: `python` where that is the one, else its path, relative if it is in this folder."""
    executable = os.path.abspath(sys.executable)
    found = shutil.which("python")
    # Not what the names resolve to: those of a virtual environment resolve to the Python that it was made of.
    if found is not None and os.path.abspath(found) == executable:
        return "python"
    below = os.path.relpath(executable)
    return shlex.quote(executable if below.startswith(os.pardir) else below)


def pip_install(what: str) -> str:
    """The command that installs requirements for this Python."""
    return f"{python()} -m pip install {what}"
