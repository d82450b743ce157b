# Licensed under the Apache License, Version 2.0 (the "License"); you may
# not use this file except in compliance with the License. You may obtain
# a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
# WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
# License for the specific language governing permissions and limitations
# under the License.

"""Another process's threads, stopped by ptrace(2), on x86_64.

The kernel lets one thread of ours trace another one, and lets go of all that
it traces when it ends. So every time that something is held a thread is begun
that makes all those calls (:class:`_Tracer`), and its end leaves nothing
traced: neither what does not stop, nor what was killed meanwhile, for both of
which PTRACE_DETACH fails.
"""

import collections.abc as cabc
from concurrent import futures
import contextlib
import os
import platform
import queue
import threading
import time
import typing as ty

from oslo_log import log as logging

from nova_pycontainer.runtime import cgroup
from nova_pycontainer.runtime.migration import ptrace

LOG = logging.getLogger(__name__)

_T = ty.TypeVar('_T')


def supported() -> bool:
    return platform.machine() == 'x86_64'


class _Tracer:
    """The thread of ours that traces."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[cabc.Callable[[], None] | None] = (
            queue.SimpleQueue())
        #: They are still in a call that is not theirs.
        self._unfinished: list[ptrace.Tracee] = []
        # Of an agent that ends it is let go of all the same.
        self._thread = threading.Thread(
            target=self._run, name='tracer', daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
        for tracee in self._unfinished:
            # Let go of now, it would run on with the registers of the call.
            try:
                tracee.finish()
            except OSError as e:
                LOG.info('thread %d is let go of: %s', tracee.tid, e)

    def do(self, function: cabc.Callable[..., _T], *arguments: ty.Any) -> _T:
        """Let it call something."""
        future: futures.Future[_T] = futures.Future()

        def job() -> None:
            try:
                future.set_result(function(*arguments))
            except BaseException as e:
                future.set_exception(e)

        self._jobs.put(job)
        return future.result()

    def release(self, tracee: ptrace.Tracee) -> None:
        if tracee.own is not None:
            self._unfinished.append(tracee)
            return
        # It is gone, or does not stop: this thread's end is what helps.
        with contextlib.suppress(OSError):
            tracee.detach()

    def close(self) -> None:
        self._jobs.put(None)
        if self._unfinished:
            # That may take as long as it likes.
            return
        self._thread.join()
        # Python's end of a thread comes before the kernel's.
        deadline = time.monotonic() + ptrace.STOP_TIMEOUT
        while (os.path.exists(f'/proc/self/task/{self._thread.native_id}') and
               time.monotonic() < deadline):
            time.sleep(0.0001)


class Thread:
    """A thread that stands still."""

    def __init__(self, tracer: _Tracer, tracee: ptrace.Tracee) -> None:
        self._tracer = tracer
        self._tracee = tracee

    def registers(self) -> ptrace.UserRegs:
        return self._tracer.do(self._tracee.registers)

    def set_registers(self, regs: ptrace.UserRegs) -> None:
        self._tracer.do(self._tracee.set_registers, regs)

    def give_back(self) -> None:
        """No call comes after this one, which a release does too."""
        with contextlib.suppress(OSError):
            self._tracer.do(self._tracee.give_back)

    def call(
        self, number: int, *arguments: int, timeout: float | None = None
    ) -> int:
        """Let it make a system call, as if it had wanted to.

        What it does itself goes on afterwards, a system call that waits
        included: its registers say so to the kernel. Signals reach it
        afterwards too.

        :param timeout: seconds that the call may wait, 2 by default. For a
            page it waits on if need be: the kernel breaks that off for a
            signal that kills only
        :returns: what the call returns, or -errno
        :raises TimeoutError: it was broken off. Where the kernel does not do
            that the thread stays stopped and traced until the call ends
        :raises OSError: it cannot be done with this thread
        """
        return self._tracer.do(
            self._tracee.call, number, arguments, timeout)


@contextlib.contextmanager
def _tracing() -> cabc.Iterator[_Tracer]:
    tracer = _Tracer()
    try:
        yield tracer
    finally:
        tracer.close()


@contextlib.contextmanager
def _held(tracer: _Tracer, tid: int) -> cabc.Iterator[Thread]:
    tracee = ptrace.Tracee(tid)
    try:
        tracer.do(tracee.hold)
        yield Thread(tracer, tracee)
    finally:
        tracer.do(tracer.release, tracee)


@contextlib.contextmanager
def stopped(tid: int) -> cabc.Iterator[Thread]:
    """:raises OSError: it has ended, or does not stop"""
    with _tracing() as tracer, _held(tracer, tid) as thread:
        yield thread


def _hold(
    tracer: _Tracer, stack: contextlib.ExitStack, threads: dict[int, Thread],
    tid: int
) -> None:
    """Hold a thread too, if it has not ended."""
    try:
        threads[tid] = stack.enter_context(_held(tracer, tid))
    except (ProcessLookupError, PermissionError):
        # The second one too is what ptrace(2) says of one that has ended, as
        # a main thread may, and is waited for by the others or by nobody yet.
        if _lives(f'/proc/{tid}'):
            raise


@contextlib.contextmanager
def held(pid: int) -> cabc.Iterator[dict[int, Thread]]:
    """Hold every thread of a process that runs.

    :raises OSError: it has ended, or one of them does not stop
    """
    threads: dict[int, Thread] = {}
    seen: set[int] = set()
    with _tracing() as tracer, contextlib.ExitStack() as stack:
        # Those that run make others meanwhile.
        while new := {int(n) for n in os.listdir(f'/proc/{pid}/task')} - seen:
            seen |= new
            for tid in new:
                _hold(tracer, stack, threads, tid)
        yield threads


def _lives(thread: str) -> bool:
    try:
        with open(f'{thread}/stat', 'rb') as f:
            return f.read().rpartition(b') ')[2][:1] not in b'ZX'
    except OSError:
        return False


def held_still(
    group: cgroup.Cgroup, stack: contextlib.ExitStack
) -> dict[int, Thread]:
    """Hold every thread of a frozen container, and thaw it.

    No system call can be made in a frozen process. At the end of the stack
    it is frozen first, so that nothing of it runs.
    """
    threads: dict[int, Thread] = {}
    tracer = stack.enter_context(_tracing())
    for pid in group.processes():
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(f'/proc/{pid}/task'):
                _hold(tracer, stack, threads, int(name))
    freeze = group.v2 / 'cgroup.freeze'
    stack.callback(freeze.write_text, '1')
    for thread in threads.values():
        # Frozen, it could not.
        stack.callback(thread.give_back)
    freeze.write_text('0')
    return threads
