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

import socket

from tests.runtime import base
from tests.runtime import terminal


class ConsoleTestCase(base.HostTestCase):

    def setUp(self):
        super().setUp()
        self.uuid = self.run_container()
        # A shell waits there, started by the image's init.
        self.wait_console(self.uuid, 'Start-up done')
        self.terminal = terminal.Terminal(
            self.host.consoles.attach(self.uuid))
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
        # It is the foreground of the terminal before it is a sleep.
        base.wait_for(
            lambda: self.sh(self.uuid, 'pidof sleep || :'), 'the command')
        self.terminal.type(b'\x03')
        self.terminal.type(b'echo go"es" on\n')
        self.terminal.wait_for(b'goes on')
        # An init that was asked to reboot would say so, and be gone soon.
        self.sh(self.uuid, 'sleep 3')
        self.assertNotIn(b'going down', self.host.console_log(self.uuid))
        info = self.host.info(self.uuid)
        self.assertEqual('running', info['state'])
        self.assertEqual(started, info['started_at'])

    # Over TCP, as Nova's proxy comes

    def _connect(self, request):
        """:returns: the stream, and the first line of the answer"""
        client = socket.create_connection(
            ('127.0.0.1', self.host.consoles.port), timeout=base.PATIENCE)
        self.addCleanup(client.close)
        client.sendall(request)
        answer = b''
        while not answer.endswith(b'\r\n\r\n'):
            byte = client.recv(1)
            self.assertTrue(byte, answer)
            answer += byte
        return client, answer.split(b'\r\n')[0].decode()

    def test_by_its_secret(self):
        token = self.host.consoles.token(self.uuid)
        self.assertEqual(token, self.host.consoles.token(self.uuid))
        self.assertEqual(self.host.consoles.port, token['port'])
        client, answer = self._connect(
            f'CONNECT {token["path"]} HTTP/1.1\r\n\r\n'.encode())
        self.assertIn(' 200 ', answer)
        client.sendall(b'echo by"te"s\n')
        output = b''
        while b'\nbytes' not in output:
            more = client.recv(4096)
            self.assertTrue(more, output)
            output += more
        # It is the keeper's: no restart of ours ends it.
        self.host.close()
        self.host = self.make_host()
        client.sendall(b'echo af"te"r\n')
        while b'\nafter' not in output:
            more = client.recv(4096)
            self.assertTrue(more, output)
            output += more
        # The same secret still.
        self.assertEqual(
            token['path'], self.host.consoles.token(self.uuid)['path'])

    def test_refused(self):
        path = self.host.consoles.token(self.uuid)['path']
        for request in (
                b'CONNECT / HTTP/1.1\r\n\r\n',
                f'CONNECT /{self.uuid} HTTP/1.1\r\n\r\n'.encode(),
                f'CONNECT {path[:-1]}x HTTP/1.1\r\n\r\n'.encode(),
                f'GET {path} HTTP/1.1\r\n\r\n'.encode(),
                b'\r\n\r\n', b'\0' * 2000):
            _, answer = self._connect(request)
            self.assertIn(' 403 ', answer)
        self.host.kill(self.uuid)
        self.assert_code('bad_state', self.host.consoles.token, self.uuid)
        _, answer = self._connect(
            f'CONNECT {path} HTTP/1.1\r\n\r\n'.encode())
        self.assertIn(' 409 ', answer)
