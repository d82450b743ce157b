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

import ctypes
import errno
import os
import pathlib
import signal
import subprocess
import sys

import fixtures

from nova_pycontainer.runtime.migration import tracer
from tests import cases
from tests.runtime import base

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
_READ, _GETPID, _ACCESS, _TGKILL = 0, 39, 21, 234


class TracerTestCase(cases.TestCase):

    def setUp(self):
        super().setUp()
        if not tracer.supported():
            self.skipTest('no processes can be traced on this architecture')
        self.process = subprocess.Popen(
            [sys.executable, '-c', _COUNTS], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True)
        self.addCleanup(self.process.communicate)
        self.addCleanup(self.process.kill)
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
            'nova_pycontainer.runtime.migration.tracer._STOP_TIMEOUT', 0.3))
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
            'nova_pycontainer.runtime.migration.tracer._STOP_TIMEOUT', 0.3))
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
        """It is the process's."""
        with tracer.stopped(self.pid) as thread:
            # Its own: the process's would go to the other thread.
            ctypes.CDLL(None).syscall(
                _TGKILL, self.pid, self.pid, signal.SIGTERM)
            self.assertRaises(tracer.Interrupted, thread.call, _GETPID)
        self.assertEqual(-signal.SIGTERM, self.process.wait(10))
