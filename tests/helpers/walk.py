"""Which files of the package a program enters: ``walk(CODE, *arguments)`` runs it in a process of its own."""

import subprocess
import sys

from conftest import ROOT

TRACED = '''
import sys
from inspect import CO_OPTIMIZED  # what the body of a module or class has not

PACKAGE = {package!r}
LAST = {last!r}
entered, others = {{}}, set()


def imported_by(frame):
    while frame is not None:
        if frame.f_code.co_name == "<module>" and frame.f_code.co_filename.startswith(PACKAGE):
            return True
        frame = frame.f_back
    return False


def note(frame, event, argument):
    """Notes the file of a function of the package, unless it is called by the import of a module."""
    code = frame.f_code
    if code in others:
        return
    if not code.co_filename.startswith(PACKAGE) or not code.co_flags & CO_OPTIMIZED:
        others.add(code)
        return
    file = code.co_filename[len(PACKAGE) :]
    if file not in entered and not imported_by(frame.f_back):
        entered[file] = code.co_name
    if LAST and code.co_name == LAST[0] and str(frame.f_locals[LAST[1]]).endswith(LAST[2]):
        end()


def end():
    sys.settrace(None)
    loaded = {{name.partition(".")[0] for name in sys.modules}}
    print("LOADED", *sorted(loaded))
    print("ENTERED", *entered, flush=True)
    if LAST:
        import os

        os._exit(0)


{imports}
sys.settrace(note)
{code}
end()
'''


def walk(
    code: str, *arguments: str, imports: str = "", last: tuple[str, str, str] | None = None
) -> tuple[list[str], set[str]]:
    """(the package's files in the order in which their functions are first called, the libraries that are loaded).

    What the ``imports`` load is not traced, which takes long. With ``last``, (function, parameter, end of its value),
    the program is left at that call.
    """
    program = TRACED.format(package=f"{ROOT / 'vitpatch'}/", last=last, code=code, imports=imports)
    done = subprocess.run([sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert "\nENTERED " in done.stdout, done.stdout[-1000:] + done.stderr[-3000:]
    printed, _, entered = done.stdout.rpartition("\nENTERED ")
    return entered.split(), set(printed.rpartition("LOADED ")[2].split())
