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

"""The console as a terminal that a login can have."""

import time

from tests.runtime import base
from tests.runtime import terminal


class ConsoleTestCase(base.HostTestCase):

    def setUp(self):
        super().setUp()
        self.uuid = self.run_container()
        # A shell waits there, started by the image's init.
        self.wait_console(self.uuid, 'Start-up done')
        self.terminal = terminal.Terminal(self.host, self.uuid)
        self.addCleanup(self.terminal.close)

    def test_the_shell_has_a_terminal_of_its_own(self):
        self.terminal.type(b'echo "options:$-:"; tty\n')
        self.terminal.wait_for(b'\n/dev/')
        # "m": job control.
        self.assertRegex(self.terminal.output.decode(),
                         r'options:[a-z]*m[a-z]*:')

    def test_the_interrupt_key_ends_a_command_and_no_machine(self):
        started = self.host.info(self.uuid)['started_at']
        self.terminal.type(b'echo be"gi"n; sleep 1000; echo en"de"d $?\n')
        self.terminal.wait_for(b'begin')
        time.sleep(0.5)
        self.terminal.type(b'\x03')
        self.terminal.type(b'echo go"es" on\n')
        self.terminal.wait_for(b'goes on')
        # An init that was asked to reboot would say so, and be gone soon.
        self.sh(self.uuid, 'sleep 3')
        self.assertNotIn(b'going down', self.host.console_log(self.uuid))
        info = self.host.info(self.uuid)
        self.assertEqual('running', info['state'])
        self.assertEqual(started, info['started_at'])
