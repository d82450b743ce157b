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

"""A shell on the console goes with the guest, and keeps its terminal."""

from tests.runtime import base
from tests.runtime import hosts
from tests.runtime import terminal


class MigrationTerminalsTestCase(hosts.TwoHostsTestCase):

    def setUp(self):
        super().setUp()
        # Its shell has /dev/tty open, and its init the console.
        self.uuid = self.run_container()
        self.terminal = self.console(self.a)
        base.wait_for(lambda: self.tty_of_the_shell(self.a), 'the shell')

    def console(self, host):
        found = terminal.Terminal(host.console_attach(self.uuid))
        self.addCleanup(found.close)
        return found

    def tty_of_the_shell(self, host):
        """Its controlling terminal and the session, of /proc/PID/stat."""
        found = self.sh(
            host, self.uuid, 'for p in /proc/[0-9]*; do '
            'grep -q "^-/bin/sh" $p/cmdline 2>/dev/null && '
            'cut -d " " -f 1,6,7 $p/stat; done; true')
        return found if found.split()[2:] not in ([], ['0']) else None

    def test_the_interrupt_key_ends_a_command(self):
        before = self.tty_of_the_shell(self.a)
        self.terminal.type(b'echo be"gi"n; sleep 1000; echo en"de"d\n')
        self.terminal.wait_for(b'begin')
        here, there = self.a, self.b
        for _ in range(3):
            self.migrate(self.uuid, here, there)
            here, there = there, here
            self.assertEqual(before, self.tty_of_the_shell(here))
        there = self.console(here)
        there.type(b'\x03')
        there.type(b'echo go"es" on\n')
        there.wait_for(b'goes on')
        self.assertNotIn('sleep', self.sh(here, self.uuid, 'ps'))

    def test_a_paused_guest(self):
        before = self.tty_of_the_shell(self.a)
        self.a.pause(self.uuid)
        self.migrate(self.uuid, self.a, self.b)
        self.assertEqual('paused', self.b.info(self.uuid)['state'])
        self.b.unpause(self.uuid)
        self.assertEqual(before, self.tty_of_the_shell(self.b))
        there = self.console(self.b)
        there.type(b'echo he"re" $(tty)\n')
        there.wait_for(b'here /dev/')

    def test_a_daemon_of_another_session_has_it_open(self):
        self.terminal.type(b'setsid sleep 1000 & echo star"te"d\n')
        self.terminal.wait_for(b'started')
        before = self.tty_of_the_shell(self.a)
        self.migrate(self.uuid, self.a, self.b)
        self.assertEqual(before, self.tty_of_the_shell(self.b))
