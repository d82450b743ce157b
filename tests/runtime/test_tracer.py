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

"""System calls that a process makes for somebody else."""

import contextlib
import ctypes
import errno
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

import fixtures
import testtools

from nova_pycontainer.runtime import cgroup
from nova_pycontainer.runtime.migration import tracer
from tests.runtime import base
from tests.runtime import traced

#: Counts, waits in between, and has a page that comes a second after it is
#: needed (userfaultfd(2)).
_COUNTS = '''
import ctypes, fcntl, mmap, os, struct, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
page = mmap.mmap(-1, mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
view = ctypes.c_char.from_buffer(page)
address = ctypes.addressof(view)
fd = libc.syscall(323, 0)
assert fd >= 0, ctypes.get_errno()
fcntl.ioctl(fd, 0xc018aa3f, struct.pack('QQQ', 0xaa, 0, 0))
fcntl.ioctl(fd, 0xc020aa00, struct.pack('QQQQ', address, mmap.PAGESIZE, 1, 0))
def fill():
    os.read(fd, 32)
    time.sleep(1)
    fcntl.ioctl(fd, 0xc020aa04, struct.pack(
        'QQQq', address, mmap.PAGESIZE, 0, 0))
threading.Thread(target=fill, daemon=True).start()
empty, _ = os.pipe()
print(address, empty, flush=True)
for line in sys.stdin:
    number, wait = line.split()
    before = time.monotonic()
    time.sleep(float(wait))
    assert time.monotonic() - before >= float(wait)
    print(int(number) + 1, flush=True)
'''
#: Runs without a system call, with a file in its memory.
_MAPS = '''
import mmap, os, sys
with open(os.fsencode(sys.argv[1]), "rb") as f:
    memory = mmap.mmap(f.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ)
print("ready", flush=True)
while True:
    pass
'''
#: Counts the signals that it gets; its end, and the number, by another one.
_SIGNALS = '''
import fcntl, os, resource, select, signal, threading
# All processes of the user have one number of them that may wait.
resource.setrlimit(resource.RLIMIT_SIGPENDING, (1000, 1000))
first, last = signal.SIGRTMIN, signal.SIGRTMIN + 1
counted = first, signal.SIGSEGV, signal.SIGSYS, signal.SIGTRAP
read, write = os.pipe()
os.set_blocking(write, False)
fcntl.fcntl(write, 1031, 1 << 20)
def count():
    number, over = 0, False
    while not over or select.select([read], [], [], 0.5)[0]:
        got = os.read(read, 1 << 20)
        number += sum(got.count(n) for n in counted)
        over = over or last in got
    print(number, flush=True)
    os._exit(0)
signal.pthread_sigmask(signal.SIG_BLOCK, [first, last])
threading.Thread(target=count, daemon=True).start()
# One byte for each, written by the handler itself.
signal.set_wakeup_fd(write)
for n in *counted, last:
    signal.signal(n, lambda *_: None)
signal.pthread_sigmask(signal.SIG_UNBLOCK, [first, last])
print("ready", flush=True)
while True:
    pass
'''
#: Waits for one signal with another one blocked instead.
_SUSPENDS = '''
import ctypes, signal, sys
libc = ctypes.CDLL(None, use_errno=True)
seen = []
one, other = signal.SIGUSR1, signal.SIGUSR2
for n in one, other:
    signal.signal(n, lambda n, _: seen.append(n))
signal.pthread_sigmask(signal.SIG_BLOCK, [one])
mask = (ctypes.c_uint64 * 16)(1 << (other - 1))
print("ready", flush=True)
if sys.argv[1] == "sigsuspend":
    result = libc.sigsuspend(mask)
else:
    result = libc.ppoll(None, 0, None, mask)
error = ctypes.get_errno()
now = signal.pthread_sigmask(signal.SIG_BLOCK, [])
print((result, error) == (-1, 4), now == {one}, seen == [one, other],
      flush=True)
'''
_IGNORES = '''
import signal, sys
for n in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
    signal.signal(n, signal.SIG_IGN)
print("ready", flush=True)
sys.stdin.read()
'''
#: Waits three seconds for a child of vfork(2)'s, which stops for nobody.
_VFORKS = '''
import ctypes, mmap, struct, sys
code = mmap.mmap(-1, mmap.PAGESIZE, prot=7)
code.write(bytes.fromhex(
    "b83a000000 0f05 85c0 7401 c3"               # vfork(2); the parent is back
    "b823000000 488d3d0d000000 31f6 0f05"        # nanosleep(2)
    "b83c000000 31ff 0f05") + struct.pack("qq", 3, 0))
address = ctypes.addressof(ctypes.c_char.from_buffer(code))
print("ready", flush=True)
ctypes.CFUNCTYPE(ctypes.c_int)(address)()
print("over", flush=True)
sys.stdin.read()
'''
_ENDS = '''
import ctypes, threading, time
threading.Thread(target=time.sleep, args=(1000,)).start()
print("ready", flush=True)
ctypes.CDLL(None).syscall(60, 0)
'''
_REFUSES = '''
import signal, sys
seen = []
signal.signal(signal.SIGSYS, lambda *_: seen.append(1))
forbid(39, action=0x30000)
print("ready", flush=True)
sys.stdin.readline()
print(seen, flush=True)
'''
_THREADS = '''
import threading, time
def begin():
    time.sleep(0.001)
    threading.Thread(target=begin).start()
for _ in range(4):
    begin()
print("ready", flush=True)
while True:
    time.sleep(0.001)
'''
_READ, _GETPID, _ACCESS, _TGKILL = 0, 39, 21, 234

_libc = ctypes.CDLL(None, use_errno=True)


def _tgkill(pid, number):
    """To its main thread."""
    _libc.syscall(_TGKILL, pid, pid, number)


class TracerTestCase(traced.TracedTestCase):

    def setUp(self):
        super().setUp()
        self.process = self.begin(_COUNTS)
        self.page, self.pipe = map(
            int, self.process.stdout.readline().split())
        self.pid = self.process.pid

    def run_python(self, code, *arguments):
        """:returns: a process that says what it is, and was read"""
        process = subprocess.Popen(
            [sys.executable, '-c', code, *arguments], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True)
        self.addCleanup(process.communicate)
        self.addCleanup(process.kill)
        self.assertEqual('ready\n', process.stdout.readline())
        return process

    def ask(self, number, wait=0.0):
        self.process.stdin.write(f'{number} {wait}\n')
        self.process.stdin.flush()

    def goes_on(self, number):
        self.assertEqual(f'{number + 1}\n', self.process.stdout.readline())

    def sleeps(self):
        base.wait_for(lambda: 'nanosleep' in pathlib.Path(
            f'/proc/{self.pid}/wchan').read_text(), 'it to sleep')

    def call(self, *arguments):
        with tracer.stopped(self.pid) as thread:
            return thread.call(*arguments)

    def test_call(self):
        """Whether it waits in a system call itself, or not."""
        self.assertEqual(self.pid, self.call(_GETPID))
        self.ask(1, 0.5)
        self.sleeps()
        self.assertEqual(self.pid, self.call(_GETPID))
        self.goes_on(1)

    def test_call_that_waits(self):
        self.useFixture(fixtures.MonkeyPatch(
            'nova_pycontainer.runtime.migration.ptrace.STOP_TIMEOUT', 0.3))
        for number, wait in (1, 0.0), (2, 0.5):
            self.ask(number, wait)
            if wait:
                self.sleeps()
            self.assertRaises(
                TimeoutError, self.call, _READ, self.pipe, self.page, 1)
            self.goes_on(number)

    def test_page_that_comes_late(self):
        """As with post-copy. The kernel breaks that off for nobody."""
        self.ask(1, 0.5)
        self.sleeps()
        with tracer.stopped(self.pid) as thread:
            self.assertEqual(-errno.ENOENT, thread.call(
                _ACCESS, self.page, os.F_OK, timeout=30.0))
        self.goes_on(1)

    def test_calls_after_one_that_waits(self):
        self.useFixture(fixtures.MonkeyPatch(
            'nova_pycontainer.runtime.migration.ptrace.STOP_TIMEOUT', 0.3))
        with tracer.stopped(self.pid) as thread:
            self.assertRaises(
                TimeoutError, thread.call, _READ, self.pipe, self.page, 1)
            self.assertEqual(self.pid, thread.call(_GETPID))
        self.ask(1)
        self.goes_on(1)

    def test_file_that_is_called_vdso(self):
        """It runs code of its own, and has such a file in its memory."""
        directory = self.useFixture(fixtures.TempDir()).path
        path = os.path.join(os.fsencode(directory), b'\xff [vdso]')
        with open(path, 'wb') as file:
            file.truncate(1 << 40)
        process = self.run_python(_MAPS, path)
        with tracer.stopped(process.pid) as thread:
            self.assertEqual(process.pid, thread.call(_GETPID))

    def test_signal_in_between(self):
        """It is the process's, and the call is made all the same."""
        with tracer.stopped(self.pid) as thread:
            # Its own: the process's would go to the other thread.
            _tgkill(self.pid, signal.SIGTERM)
            self.assertEqual(self.pid, thread.call(_GETPID))
            self.assertEqual(self.pid, thread.call(_GETPID))
        self.assertEqual(-signal.SIGTERM, self.process.wait(10))

    def test_no_signal_is_lost(self):
        """While it gets as many as it can take."""
        process = self.run_python(_SIGNALS)
        sent, over = 0, threading.Event()

        def send():
            nonlocal sent
            while not over.is_set():
                # EAGAIN: too many of them wait.
                if _libc.sigqueue(process.pid, signal.SIGRTMIN, None) == 0:
                    sent += 1
        thread = threading.Thread(target=send)
        thread.start()
        try:
            end = time.monotonic() + 3
            while time.monotonic() < end:
                with tracer.stopped(process.pid) as held:
                    for _ in range(3):
                        self.assertEqual(process.pid, held.call(_GETPID))
        finally:
            over.set()
            thread.join()
        base.wait_for(lambda: not int(re.search(
            r'^ShdPnd:\t(\w+)$', pathlib.Path(
                f'/proc/{process.pid}/status').read_text(), re.M)[1], 16),
            'it to get them')
        os.kill(process.pid, signal.SIGRTMIN + 1)
        self.assertEqual(f'{sent}\n', process.stdout.readline())

    def test_signals_that_are_not_blocked(self):
        """Those that the kernel sends for faults, sent by a process."""
        process = self.run_python(_SIGNALS)
        for number in signal.SIGSEGV, signal.SIGSYS, signal.SIGTRAP:
            with tracer.stopped(process.pid) as thread:
                _tgkill(process.pid, number)
                self.assertEqual(process.pid, thread.call(_GETPID))
                _tgkill(process.pid, number)
                self.assertEqual(process.pid, thread.call(_GETPID))
        os.kill(process.pid, signal.SIGRTMIN + 1)
        # Two that wait at the same time are one, for those below SIGRTMIN.
        self.assertEqual('5\n', process.stdout.readline())

    def test_waits_with_other_signals_blocked(self):
        """The call goes on, and what was blocked before it is so after."""
        for call in 'sigsuspend', 'poll':
            process = self.suspended(call)
            before = self.masks(process.pid)
            with tracer.stopped(process.pid) as thread:
                self.assertEqual(process.pid, thread.call(_GETPID))
                self.assertEqual(process.pid, thread.call(_GETPID))
            self.waits(process.pid, call)
            self.assertEqual(before, self.masks(process.pid))
            with tracer.stopped(process.pid) as thread:
                self.gets_signals(process, thread)
            self.assertEqual('True True True\n', process.stdout.readline())

    def suspended(self, call):
        process = self.run_python(_SUSPENDS, call)
        self.waits(process.pid, call)
        return process

    def gets_signals(self, process, thread):
        self.assertEqual(process.pid, thread.call(_GETPID))
        # Blocked in the call only, and blocked before it and after it only.
        os.kill(process.pid, signal.SIGUSR2)
        os.kill(process.pid, signal.SIGUSR1)
        self.assertEqual(process.pid, thread.call(_GETPID))

    def test_frozen(self):
        """As it is without a call, and with one it is frozen again."""
        group = cgroup.Cgroup(
            cgroup.Hierarchies(), f'tracer-{os.getpid()}')
        directory = group.v2
        directory.mkdir()
        self.addCleanup(base.wait_for, lambda: not subprocess.run(
            ['rmdir', directory], stderr=subprocess.DEVNULL).returncode,
            'the end of what is in there')
        process = self.suspended('sigsuspend')
        (directory / 'cgroup.procs').write_text(str(process.pid))
        group.freeze(True)
        with contextlib.ExitStack() as stack:
            held = tracer.held_still(group, stack)
            self.assertEqual([process.pid], list(held))
            self.gets_signals(process, held[process.pid])
        base.wait_for(group.frozen, 'it to be frozen')
        group.freeze(False)
        self.assertEqual('True True True\n', process.stdout.readline())
        process.kill()

    def waits(self, pid, where):
        base.wait_for(lambda: where in pathlib.Path(
            f'/proc/{pid}/wchan').read_text(), f'it to wait in {where}')

    def masks(self, pid):
        return [line for line in pathlib.Path(
            f'/proc/{pid}/status').read_text().splitlines()
            if line.startswith('Sig')]

    def test_ignored_signals_stay_so(self):
        process = self.run_python(_IGNORES)
        before = self.masks(process.pid)
        with tracer.stopped(process.pid) as thread:
            self.assertEqual(process.pid, thread.call(_GETPID))
        self.assertEqual(before, self.masks(process.pid))

    def state(self, pid):
        return pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(
            ') ')[2][0]

    def test_process_that_is_stopped(self):
        """By a signal; before, and meanwhile."""
        os.kill(self.pid, signal.SIGSTOP)
        base.wait_for(lambda: self.state(self.pid) == 'T', 'it to stop')
        self.assertEqual(self.pid, self.call(_GETPID))
        base.wait_for(lambda: self.state(self.pid) == 'T', 'it to stop')
        os.kill(self.pid, signal.SIGCONT)
        self.ask(1)
        self.goes_on(1)
        with tracer.stopped(self.pid) as thread:
            os.kill(self.pid, signal.SIGSTOP)
            self.assertEqual(self.pid, thread.call(_GETPID))
        base.wait_for(lambda: self.state(self.pid) == 'T', 'it to stop')
        os.kill(self.pid, signal.SIGCONT)
        self.ask(2)
        self.goes_on(2)

    def tracer_of(self, pid):
        return re.search(r'^TracerPid:\t(\d+)$', pathlib.Path(
            f'/proc/{pid}/status').read_text(), re.M)[1]

    def test_thread_that_does_not_stop(self):
        """It is let go of: somebody else may trace it, and it runs on."""
        self.useFixture(fixtures.MonkeyPatch(
            'nova_pycontainer.runtime.migration.ptrace.STOP_TIMEOUT', 0.3))
        process = self.run_python(_VFORKS)
        self.waits(process.pid, 'kernel_clone')
        with testtools.ExpectedException(TimeoutError):
            with tracer.stopped(process.pid):
                pass
        self.assertEqual('0', self.tracer_of(process.pid))
        self.assertEqual('over\n', process.stdout.readline())
        with tracer.stopped(process.pid) as thread:
            self.assertEqual(process.pid, thread.call(_GETPID))

    def test_call_that_does_not_end(self):
        """It goes on with its own registers when that ends."""
        self.useFixture(fixtures.MonkeyPatch(
            'nova_pycontainer.runtime.migration.ptrace.STOP_TIMEOUT', 0.2))
        self.ask(1, 0.5)
        self.sleeps()
        with tracer.stopped(self.pid) as thread:
            self.assertRaises(
                TimeoutError, thread.call, _ACCESS, self.page, os.F_OK)
            self.assertRaises(OSError, thread.call, _GETPID)
        self.goes_on(1)
        base.wait_for(lambda: self.tracer_of(self.pid) == '0', 'its release')
        self.assertEqual(self.pid, self.call(_GETPID))

    def test_all_threads(self):
        """Of a process that makes new ones all the time."""
        process = self.run_python(_THREADS)
        for _ in range(20):
            with tracer.held(process.pid) as threads:
                self.assertIn(process.pid, threads)
                found = os.listdir(f'/proc/{process.pid}/task')
                self.assertEqual(['t'] * len(found), [
                    self.state(f'{process.pid}/task/{tid}') for tid in found])
                self.assertEqual(
                    process.pid, threads[process.pid].call(_GETPID))

    def test_main_thread_that_has_ended(self):
        """The others are the process."""
        process = self.run_python(_ENDS)
        base.wait_for(lambda: self.state(process.pid) == 'Z', 'its end')
        with tracer.held(process.pid) as threads:
            (tid, thread), = threads.items()
            self.assertNotEqual(process.pid, tid)
            self.assertEqual(process.pid, thread.call(_GETPID))

    def test_call_that_is_refused(self):
        """By a filter with a signal, which the process does not get."""
        process = self.run_python(f'{base.FILTER}{_REFUSES}')
        for _ in range(2):
            with tracer.stopped(process.pid) as thread:
                self.assertRaises(OSError, thread.call, _GETPID)
                self.assertRaises(OSError, thread.call, _GETPID)
        process.stdin.write('hello\n')
        process.stdin.flush()
        self.assertEqual('[]\n', process.stdout.readline())

    def test_killed_while_it_is_held(self):
        """Its parent hears of it."""
        shell = subprocess.Popen(
            ['sh', '-c', 'sleep 1000 & echo $!; wait $!; echo $?'],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.addCleanup(shell.communicate)
        self.addCleanup(shell.kill)
        pid = int(shell.stdout.readline())
        with tracer.stopped(pid) as thread:
            os.kill(pid, signal.SIGKILL)
            base.wait_for(lambda: self.state(pid) == 'Z', 'its end')
            self.assertRaises(OSError, thread.call, _GETPID)
        shell.wait(10)
        self.assertEqual('137\n', shell.stdout.read())
