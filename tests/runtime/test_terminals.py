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

"""Descriptors of /dev/tty that become ones of the terminal itself.

That a shell keeps its terminal is what ``test_migration_terminals`` shows.
"""

import pathlib
import types

import fixtures

from nova_pycontainer.runtime.migration import terminals
from nova_pycontainer.runtime.migration import tracer
from tests.runtime import base
from tests.runtime import traced

#: The first process of a guest, which keeps a terminal open, and a shell of
#: that terminal, which has got /dev/tty as 9 and does what it is told.
_SHELL = '''
import os, signal, sys
master, slave = os.openpty()
name = os.ttyname(slave)
child = os.fork()
if child:
    os.waitpid(child, 0)
    os._exit(1)
os.setsid()
os.close(master)
os.close(slave)
os.open(name, os.O_RDWR)
tty = os.open("/dev/tty", os.O_RDWR)
os.dup2(tty, 9)
os.close(tty)
print("ready", flush=True)
for line in sys.stdin:
    exec(line)
    print("done", flush=True)
'''


class TerminalsTestCase(traced.TracedTestCase):

    def setUp(self):
        super().setUp()
        self.outer = self.begin(_SHELL, by=traced.GUEST)
        self.assertEqual('ready\n', self.outer.stdout.readline())
        init, = self.children(self.outer.pid)
        self.shell, = self.children(init)
        self.group = types.SimpleNamespace(
            processes=lambda: iter([init, self.shell]))

    def tell(self, code):
        self.outer.stdin.write(f'{code}\n')
        self.outer.stdin.flush()
        self.assertEqual('done\n', self.outer.stdout.readline())

    def before_it_is_held(self, code):
        held = tracer.held

        def later(pid):
            self.tell(code)
            return held(pid)
        self.useFixture(fixtures.MonkeyPatch(
            'nova_pycontainer.runtime.migration.tracer.held', later))

    def file(self):
        return str(pathlib.Path(f'/proc/{self.shell}/fd/9').readlink())

    def release(self):
        """:returns: what its descriptor is of then"""
        self.assertEqual('/dev/tty', self.file())
        terminals.release(self.group, frozen=False)
        # It is as it was, and does not know.
        self.tell('pass')
        return self.file()

    def test_release(self):
        self.assertTrue(self.release().startswith('/dev/pts/'))

    def test_another_file_meanwhile(self):
        """It gets the number of the one that was closed."""
        self.before_it_is_held('os.close(9); os.open("/dev/null", 0); '
                               'os.dup2(os.open("/proc/self/stat", 0), 9)')
        self.assertTrue(self.release().endswith('/stat'))

    def test_another_session_meanwhile(self):
        """Its parent's terminal is what /dev/tty stands for no more."""
        self.before_it_is_held(
            'import fcntl, termios; signal.signal(signal.SIGHUP, '
            'signal.SIG_IGN); fcntl.ioctl(9, termios.TIOCNOTTY)')
        self.assertEqual('/dev/tty', self.release())

    def test_gone_from_the_guest_meanwhile(self):
        """As one that has got the number of another one."""
        held = tracer.held

        def later(pid):
            processes = list(self.group.processes())
            processes.remove(self.shell)
            self.group.processes = lambda: iter(processes)
            return held(pid)
        self.useFixture(fixtures.MonkeyPatch(
            'nova_pycontainer.runtime.migration.tracer.held', later))
        self.assertEqual('/dev/tty', self.release())

    def test_a_filter_of_its_own(self):
        """It would be ended for a call that it does not make itself."""
        self.tell(f'exec({base.FILTER!r}); forbid(292)')
        self.assertEqual('/dev/tty', self.release())
