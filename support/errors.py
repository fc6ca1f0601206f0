"""One policy for errors that a user can cause: ValueError or OSError, in one line.

flags.run prints that line and ends with exit code 2. Any other exception is a bug, and a traceback.
"""
import contextlib
import functools


def need(fine, what, kind=ValueError):
    """Raise kind(what) unless `fine`. It is for errors that a user can mend: `what` is one line
    that says what is wrong and what to do."""
    if not fine:
        raise kind(what)


@contextlib.contextmanager
def blame(what, kind=ValueError, hide="\0", show=".."):
    """Every exception in here becomes one error, of one line that begins with `what`.

    Damaged files and foreign libraries may raise anything. A file that is missing, or that may not
    be read, stays the error that it is. Our own kind of error keeps its words after `what`. hide:
    a temporary path that would only confuse: `show` is said for it."""
    try:
        yield
    except (Exception, SystemExit) as problem:         # a user's file may call exit()
        says = " ".join(str(problem).split()).replace(str(hide), str(show))[:400]
        if type(problem) in (FileNotFoundError, PermissionError) and kind is not OSError:
            raise type(problem)(says) from problem
        if "weights_only" in says:                     # torch advises to switch this check off
            says = "reading it could run code: take the weights as .safetensors"
        name = "" if type(problem) is kind else f"{type(problem).__name__}: "
        raise kind(f"{what}: {name}{says}") from problem


def need_saved(path):
    """The path of what a run has saved. Raises FileNotFoundError if there is nothing to resume."""
    need(path.is_file(), f"nothing to resume: {path} is missing; leave --resume out",
         FileNotFoundError)
    return path


def need_same(path, theirs, ours):
    """Raise ValueError if the settings of an earlier run, in `path`, are not those of this one."""
    theirs = theirs if isinstance(theirs, dict) else {}          # else the file is damaged
    odd = [name for name in ours if theirs.get(name) != ours[name]]
    need("ranks" not in odd, f"{path} is of {theirs.get('ranks')} ranks, and this run has "
         f"{ours.get('ranks')}: start as many as before (torchrun --nproc_per_node)")
    need(not odd, f"{path} is of another run ({', '.join(odd)} differ): use the same "
         "flags, links, prompts and data, or another folder")


def shown(text):
    """A text as a terminal may get it: control characters are written out, like \\x1b.

    A row, a model or a server may have chosen the text, and such characters can move the cursor,
    change colours or rename the window."""
    return "".join(sign if sign.isprintable() or sign in "\n\t" else repr(sign)[1:-1]
                   for sign in str(text))


@functools.cache
def say_once(text):
    """Print a line, unless it was printed before."""
    print(text, flush=True)
