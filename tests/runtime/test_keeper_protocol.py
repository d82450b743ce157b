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

"""What the keeper makes of its clients."""

import json
import os
import pty
import socket
import stat
import subprocess

from nova_pycontainer.runtime import keeper
from tests.runtime import keeper_base as base


class TestProtocol(base.KeeperTestCase):

    def ask(self, packet):
        """Send one packet; returns the answer and whether we were cut off."""
        sock = self.raw()
        sock.send(packet)
        answer = json.loads(sock.recv(keeper.MAX_PACKET))
        try:
            closed = sock.recv(1) == b''
        except TimeoutError:
            closed = False
        return answer, closed

    def test_the_socket_is_roots_alone(self):
        mode = os.stat(self.socket).st_mode
        self.assertEqual(0o600, stat.S_IMODE(mode))

    def test_garbage_is_refused_and_its_sender_disconnected(self):
        for packet in (
            b'garbage', b'\xff\xfe', b'{"v": 1, "id"', b'[]', b'null',
            b'{}', b'{"v": 1, "id": true, "verb": "ping"}',
            b'{"v": 1, "id": 1, "verb": "ping", "params": []}',
            b'[' * 50000, b'\0',
        ):
            with self.subTest(packet=packet[:60]):
                answer, closed = self.ask(packet)
                self.assertEqual('invalid', answer['error']['code'])
                self.assertTrue(closed)
        self.client.ping()

    def test_another_version_is_refused_by_name(self):
        answer, closed = self.ask(
            b'{"v": 2, "id": 1, "verb": "ping", "params": {}}')
        self.assertEqual('unsupported', answer['error']['code'])
        self.assertIn('version 1', answer['error']['message'])
        self.assertTrue(closed)

    def test_a_packet_that_is_too_large_is_refused(self):
        request = {'v': 1, 'id': 1, 'verb': 'run', 'params': {
            'argv': ['touch', f'{self.dir}/ran', 'x' * keeper.MAX_PACKET],
            'timeout_s': 5}}
        answer, closed = self.ask(json.dumps(request).encode())
        self.assertEqual('invalid', answer['error']['code'])
        self.assertIn('too large', answer['error']['message'])
        self.assertTrue(closed)
        self.assertFalse(os.path.exists(f'{self.dir}/ran'))

    def test_a_part_of_a_packet_is_refused(self):
        whole = json.dumps({'v': 1, 'id': 1, 'verb': 'run', 'params': {
            'argv': ['touch', f'{self.dir}/ran'], 'timeout_s': 5}}).encode()
        for size in (1, len(whole) // 2, len(whole) - 1):
            answer, closed = self.ask(whole[:size])
            self.assertEqual('invalid', answer['error']['code'])
            self.assertTrue(closed)
        self.assertFalse(os.path.exists(f'{self.dir}/ran'))

    def test_wrong_parameters_are_refused_and_the_peer_may_go_on(self):
        good = {'argv': ['true'], 'timeout_s': 5}
        wrong = [
            ('nosuch', {}), ('run', {}), ('run', {**good, 'argv': []}),
            ('run', {**good, 'argv': 'true'}),
            ('run', {**good, 'argv': ['']}),
            ('run', {**good, 'argv': ['a\0b']}),
            ('run', {**good, 'argv': ['\ud800']}),
            ('run', {**good, 'timeout_s': 0}),
            ('run', {**good, 'timeout_s': True}),
            ('run', {**good, 'timeout_s': float('nan')}),
            ('run', {**good, 'cwd': 'relative'}),
            ('run', {**good, 'env': {'A=B': 'c'}}),
            ('run', {**good, 'fds': [0]}),
            ('run', {**good, 'fds': [-1]}),
            ('run', {**good, 'extra': 1}),
            ('watch', {'uuid': '../x', 'pid': 1, 'exit_path': '/x'}),
            ('watch', {'uuid': 'x', 'pid': 0, 'exit_path': '/x'}),
            ('watch', {'uuid': 'x', 'pid': 1, 'exit_path': 'x'}),
            ('hold', {'uuid': 'x', 'log_path': '/x', 'max_bytes': 65536}),
            ('attach', {'uuid': 'x', 'mode': 'w'}),
            ('resize', {'uuid': 'x', 'rows': 0, 'columns': 1}),
            ('list', {'after': 5}),
        ]
        sock = self.raw()
        for number, (verb, params) in enumerate(wrong):
            with self.subTest(verb=verb, params=params):
                sock.send(json.dumps({
                    'v': 1, 'id': number, 'verb': verb,
                    'params': params}).encode())
                answer = json.loads(sock.recv(keeper.MAX_PACKET))
                self.assertEqual(number, answer['id'])
                self.assertEqual('invalid', answer['error']['code'])
        sock.send(b'{"v": 1, "id": 99, "verb": "ping"}')
        self.assertEqual(99, json.loads(sock.recv(4096))['id'])

    def test_another_user_is_refused_even_with_a_socket_that_is_open(self):
        # As an operator who has opened the permissions by mistake.
        os.chmod(self.dir, 0o755)
        os.chmod(self.socket, 0o666)
        script = (
            'import socket, sys\n'
            's = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n'
            's.connect(sys.argv[1])\n'
            'try:\n'
            '    s.send(b\'{"v": 1, "id": 1, "verb": "ping"}\')\n'
            '    print(s.recv(4096))\n'
            'except OSError as e:\n'
            '    print(e)\n')
        result = subprocess.run(
            ['setpriv', '--reuid=65534', '--clear-groups',
             '/usr/bin/python3', '-c', script, self.socket],
            capture_output=True, text=True, timeout=base.PATIENCE)
        self.assertEqual(0, result.returncode, result.stderr)
        self.assertNotIn('version', result.stdout)

    def test_no_descriptor_stays_behind(self):
        pid = self.client.ping()['pid']
        before = base.descriptors(pid, sockets=1)
        null = os.open('/dev/null', os.O_RDWR)
        self.addCleanup(os.close, null)
        # Refused in every way there is, with descriptors beside it.
        for packet in (
            b'garbage', b'{"v": 1, "id": 1, "verb": "ping"}',
            b'{"v": 1, "id": 1, "verb": "nosuch"}',
            b'{"v": 1, "id": 1, "verb": "hold", "params": {"uuid": "x", '
            b'"log_path": "/nonexistent/x", "max_bytes": 65536}}',
            b'{"v": 1, "id": 1, "verb": "attach", "params": {"uuid": "x"}}',
            b'x' * (keeper.MAX_PACKET + 1),
        ):
            for count in (1, keeper.MAX_FDS, keeper.MAX_FDS + 9):
                sock = self.raw()
                socket.send_fds(sock, [packet], [null] * count)
                self.assertIn('error', json.loads(sock.recv(4096)))
                sock.close()
        # And accepted, to the end.
        for _ in range(3):
            self.client.run(['true'], fds={0: null, 5: null})
            self.assertError('internal', self.client.run, ['/nonexistent'],
                             fds={0: null})
            pid_ = self.client.spawn(['true'], fds={1: null})
            self.client.watch('x', pid_, f'{self.dir}/exit')
            master, slave = pty.openpty()
            self.client.hold('x', master, f'{self.dir}/log2', 65536)
            self.client.hold('x', master, f'{self.dir}/log2', 65536)
            ours, theirs = socket.socketpair()
            self.client.attach('x', theirs.fileno())
            self.client.subscribe().close()
            self.client.release('x')
            for fd in (master, slave):
                os.close(fd)
            ours.close()
            theirs.close()
        self.assertEqual(before, base.descriptors(pid, sockets=1))

    def test_a_client_that_dies_harms_nobody(self):
        # In the middle of its command: that runs on.
        sock = self.raw()
        sock.send(json.dumps({'v': 1, 'id': 1, 'verb': 'run', 'params': {
            'argv': ['sh', '-c',
                     f'until [ -e {self.dir}/go ]; do sleep .05; done; '
                     f'touch {self.dir}/ran'], 'timeout_s': 50}}).encode())
        sock.close()
        self.client.ping()
        open(f'{self.dir}/go', 'w').close()
        base.wait_for(lambda: os.path.exists(f'{self.dir}/ran'), 'the command')
        # As a subscriber, and as a viewer, without a goodbye.
        subscriber = self.client.subscribe()
        slave = self.hold_console()
        ours, theirs = socket.socketpair()
        self.client.attach(self.uuid, theirs.fileno())
        theirs.close()
        subscriber.close()
        ours.close()
        os.write(slave, b'anybody?')
        pid = self.client.spawn(['true'])
        self.client.watch(self.uuid, pid, f'{self.dir}/exit')
        base.wait_for(lambda: os.path.exists(f'{self.dir}/exit'), 'the exit')
        base.wait_for(lambda: not self.client.list()[0]['console']['viewers'],
                      'the viewer to be forgotten')
        os.close(slave)

    def hold_console(self):
        master, slave = pty.openpty()
        self.client.hold(self.uuid, master, f'{self.dir}/c.log', 65536)
        os.close(master)
        return slave

    def test_a_subscriber_that_does_not_read_is_cut_off(self):
        lazy = self.raw()
        lazy.send(b'{"v": 1, "id": 1, "verb": "subscribe"}')
        self.assertEqual({}, json.loads(lazy.recv(4096))['result'])
        pid = self.client.ping()['pid']
        base.descriptors(pid, sockets=2)
        # The kernel keeps some for it, the keeper MAX_QUEUE more.
        for _ in range(2 * keeper.MAX_QUEUE):
            child = self.client.spawn(['true'])
            self.client.watch(self.uuid, child, f'{self.dir}/exit')
            if sum(name.startswith('socket:')
                   for name in base.open_files(pid)) == 1:
                break
        base.descriptors(pid, sockets=1)
