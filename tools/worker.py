r"""One process that reads and compares answers for us, with a clock.

    in_worker(function, *arguments).result(0)      what function(*arguments) returns

A model may write anything. sympy may think about \boxed{9^{9^{9^9}}} for ever, and so may a regular
expression about a text that nobody has tried. In our own process nothing could end it, not even
Ctrl-C. So one worker, a process of its own, reads and compares all answers. A call that takes
longer than SECONDS is ended together with the worker, and the next call gets a new worker. So a
hang costs one answer. A call costs about a millisecond.

A worker that is ended leaves its own children behind. So nothing that starts a program or asks a
service runs in it.
"""
import contextlib
import multiprocessing
import os
import re
import signal
import threading
from concurrent.futures import wait
from pathlib import Path

import pebble

from support.errors import need

SECONDS, MEMORY_MB = 4, 4096    # the most that one call may take
POOLS, PREPARED, LOCK = [], set(), threading.Lock()


def in_worker(function, *arguments, prepare=None):
    """A Future that is done: function(*arguments), called in the worker. Thread-safe.

    Its result(0) raises TimeoutError if the call took longer than SECONDS, or whatever the function
    raised. function: of a module, because it is pickled. prepare: called here before the worker is
    forked, so that the worker need not load the same again. Raises RuntimeError if the worker was
    ended from outside before the call."""
    pool = None
    while not POOLS or pool is not POOLS[-1]:      # another thread may need one that is prepared
        with LOCK:
            pool = worker(prepare)
            asked = pool.schedule(guarded, (function, arguments), {}, SECONDS)
        while pool.active and not asked.done():    # a pool that breaks may forget a question
            wait([asked], 1)
    need(asked.done(), "the process that compares answers was ended", RuntimeError)
    return asked


def worker(prepare):
    """The pool with the one process, forked after prepare(), for all threads. (LOCK is held.)

    It is forked, so it has sympy loaded, and the user's script is not started again. (Where there
    is no fork, on Windows, it is spawned.) After 200 calls a new process goes on, so what sympy
    keeps in memory cannot pile up."""
    runs = POOLS and POOLS[-1].active          # the system may kill a process that is idle
    if not runs or prepare and prepare not in PREPARED:
        if prepare:
            prepare()
            PREPARED.add(prepare)
        if runs:                               # it was forked before this
            POOLS[-1].stop()
            POOLS[-1].join()
        way = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")
        POOLS.append(pebble.ProcessPool(1, max_tasks=200, initializer=confine, context=way))
        # The first call forks. Forked from an executor's thread, a process would wait for itself
        # when it ends, and that would break the pool. So a thread of its own makes this call.
        first = threading.Thread(target=POOLS[-1].schedule, args=(int,))
        first.start()
        first.join()
    return POOLS[-1]


def confine():
    """In the worker, when it starts: limit its data to MEMORY_MB more than it was forked with. (As
    far as the system has such limits.) And let it end at once when it is told to."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with contextlib.suppress(ImportError, AttributeError, OSError, ValueError):
        import resource
        used_kb = re.search(r"VmData:\s*(\d+)", Path("/proc/self/status").read_text())[1]
        limit = int(used_kb) * 2**10 + MEMORY_MB * 2**20
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def guarded(function, arguments):
    """In the worker: function(*arguments).

    If the main process dies, a worker that waits ends, because its pipe is closed. A worker that
    works is ended by a timer of its processor time."""
    if hasattr(signal, "setitimer"):           # Windows has none
        signal.setitimer(signal.ITIMER_PROF, 2 * SECONDS)
    return function(*arguments)
