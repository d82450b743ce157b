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


"""Locks of files, given back to a process that does not know of it.

That CRIU loses them, and that a database needs them, is what
``test_faults.test_locks_of_a_database`` shows.
"""

import fcntl
import os
import pathlib
import types

import fixtures

from nova_pycontainer.runtime.migration import file_locks
from tests.runtime import base
from tests.runtime import traced

#: Has a file open, and answers line by line.
_HOLDER = '''
import os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
os.dup2(fd, 9)
print("ready", flush=True)
for line in sys.stdin:
    print("heard", line.strip(), flush=True)
'''

#: The same, with no address in its stack pointer.
_NO_STACK = '''
import ctypes, mmap, os, sys
os.dup2(os.open(sys.argv[1], os.O_RDWR), 9)
code = mmap.mmap(-1, mmap.PAGESIZE, prot=7)
# mov rsp, 0xf000000000000000; jmp to itself
code.write(bytes.fromhex('48bc 00000000000000f0 ebfe'))
print("ready", flush=True)
address = ctypes.addressof(ctypes.c_char.from_buffer(code))
ctypes.CFUNCTYPE(None)(address)()
'''

#: access(2), fcntl(2)
_NO_ACCESS = f'{base.FILTER}\nforbid(21)\n{_HOLDER}'
_NO_LOCKS = f'''{base.FILTER}
import os
child = os.fork()
if child:
    os.waitpid(child, 0)
    os._exit(1)
forbid(21, 72)
{_HOLDER}'''

READ, WRITE = fcntl.F_RDLCK, fcntl.F_WRLCK


class FileLocksTestCase(traced.TracedTestCase):

    def setUp(self):
        super().setUp()
        self.file = pathlib.Path(
            self.useFixture(fixtures.TempDir()).path, 'file')
        self.file.write_bytes(bytes(4096))
        (self.file.parent / 'cgroup.freeze').write_text('0\n')
        self.start(_HOLDER)

    def start(self, code):
        self.outer = self.begin(code, self.file, by=traced.GUEST)
        self.assertEqual('ready\n', self.outer.stdout.readline())
        self.pid, = self.pids = self.children(self.outer.pid)
        self.group = types.SimpleNamespace(
            processes=lambda: self.pids, v2=self.file.parent)

    def lock(self, kind=WRITE, start=0, length=0, fd=9, pid=1):
        return file_locks.Lock(pid, fd, kind, start, length)

    def restore(self, *locks, late=False):
        file_locks.restore(self.group, list(locks), late)
        # It is as it was, and does not know.
        self.outer.stdin.write('hello\n')
        self.outer.stdin.flush()
        self.assertEqual('heard hello\n', self.outer.stdout.readline())

    def free(self, kind, start, length):
        """Whether another process could lock that."""
        with open(self.file, 'r+b') as file:
            try:
                fcntl.lockf(
                    file, (fcntl.LOCK_SH if kind == READ else fcntl.LOCK_EX) |
                    fcntl.LOCK_NB, length, start)
            except OSError:
                return False
        return True

    def test_ranges_and_kinds(self):
        self.restore(self.lock(READ, 100, 10), self.lock(WRITE, 200, 1))
        self.assertTrue(self.free(READ, 100, 10))
        self.assertFalse(self.free(WRITE, 109, 1))
        self.assertTrue(self.free(WRITE, 110, 90))
        self.assertFalse(self.free(READ, 200, 1))
        self.assertTrue(self.free(WRITE, 201, 100))

    def test_to_the_end(self):
        self.restore(self.lock(WRITE, 10))
        self.assertTrue(self.free(WRITE, 0, 10))
        self.assertFalse(self.free(READ, 1 << 40, 1))

    def test_what_it_has_stays(self):
        lock = self.lock(WRITE, 10, 5)
        self.restore(lock)
        before = pathlib.Path(f'/proc/{self.pid}/fdinfo/9').read_text()
        self.restore(lock)
        self.assertEqual(
            before, pathlib.Path(f'/proc/{self.pid}/fdinfo/9').read_text())

    def test_somebody_else_has_it(self):
        """The other one keeps it, and the process lives."""
        with open(self.file, 'r+b') as file:
            fcntl.lockf(file, fcntl.LOCK_EX)
            with self.assertLogs(file_locks.__name__, 'WARNING') as logs:
                self.restore(self.lock())
            self.assertIn('has lost a lock', logs.output[0])
        self.assertTrue(self.free(WRITE, 0, 0))

    def test_what_is_no_more(self):
        """A process that has ended, and a descriptor that was closed."""
        self.restore(self.lock(pid=77), self.lock(fd=55))
        self.assertTrue(self.free(WRITE, 0, 0))
        self.assertEqual(
            [], [fd for fd in os.listdir(f'/proc/{self.pid}/fd')
                 if int(fd) not in (0, 1, 2, 3, 9)])

    def test_a_stack_that_is_nowhere(self):
        self.start(_NO_STACK)
        stat = pathlib.Path(f'/proc/{self.pid}/stat')
        # utime of proc_pid_stat(5): it does nothing else then.
        before = int(stat.read_text().split()[13])
        base.wait_for(lambda: int(stat.read_text().split()[13]) > before + 10,
                      'it to run')
        with self.assertLogs(file_locks.__name__, 'WARNING') as logs:
            file_locks.restore(self.group, [self.lock()])
        self.assertIn('has lost a lock', logs.output[0])
        # It runs on.
        self.assertIsNone(self.outer.poll())

    def test_pages_that_are_still_to_come(self):
        self.restore(self.lock(), late=True)
        self.assertFalse(self.free(READ, 0, 0))

    def test_a_filter_of_all(self):
        """No more is called than is needed."""
        self.start(_NO_ACCESS)
        self.restore(self.lock())
        self.assertFalse(self.free(READ, 0, 0))

    def test_a_filter_of_its_own(self):
        """It would be ended for a call that it does not make itself."""
        self.start(_NO_LOCKS)
        self.pids += self.children(self.pid)
        with self.assertLogs(file_locks.__name__, 'WARNING') as logs:
            self.restore(self.lock(pid=2))
        self.assertIn('has lost a lock', logs.output[0])
        self.assertTrue(self.free(WRITE, 0, 0))
