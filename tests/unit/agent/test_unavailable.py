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

"""The client of an agent that is not there."""

import os
import socket
import threading
import time

from nova_pycontainer.agent import client
from nova_pycontainer.agent import protocol
from nova_pycontainer.runtime import errors
from tests.unit.agent import base

KEY = 'sha512-' + 'a' * 128


class TestUnavailable(base.AgentTestCase):

    def test_without_a_socket(self):
        absent = client.Client(str(self.dir / 'nothing'))
        for call in (absent.list, absent.host_info,
                     lambda: absent.console_attach(self.uuid),
                     lambda: absent.layer_import(KEY, [b'x'], image='i')):
            error = self.assertRaises(errors.AgentUnavailable, call)
            self.assertEqual('agent_unavailable', error.code)
            self.assertIn('nothing', str(error))
            self.assertIn('No such file', error.cause)

    def test_with_a_socket_that_nobody_serves(self):
        self.server.stop(base.PATIENCE)
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(self.path)
        error = self.assertRaises(errors.AgentUnavailable, self.client.list)
        self.assertIn('refused', error.cause)

    def test_with_an_agent_that_is_restarted(self):
        """Who has a request waits, but not for ever and not once more."""
        path = str(self.dir / 'later.sock')
        patient = client.Client(path, patience_s=base.PATIENCE)
        came = threading.Event()
        thread = threading.Thread(
            target=lambda: (patient.list(), came.set()), daemon=True)
        thread.start()
        # What tells whether it is there does not wait.
        self.assertRaises(errors.AgentUnavailable, patient.events, 0, 0)
        self.assertFalse(came.wait(0.5))
        os.link(self.path, path)
        self.assertTrue(came.wait(base.PATIENCE))

        os.unlink(path)
        hasty = client.Client(path, patience_s=0.6)
        began = time.monotonic()
        self.assertRaises(errors.AgentUnavailable, hasty.list)
        self.assertGreater(time.monotonic() - began, 0.5)
        tries = []
        original = socket.socket.connect
        socket.socket.connect = lambda *a: (
            tries.append(a), original(*a))
        self.addCleanup(setattr, socket.socket, 'connect', original)
        self.assertRaises(errors.AgentUnavailable, hasty.list)
        self.assertEqual(1, len(tries))

    def test_with_an_agent_that_goes_away_or_talks_nonsense(self):
        self.server.stop(base.PATIENCE)
        for reply in (b'', b'HTTP/1.1 200 OK\r\nContent-Length: 100\r\n'
                      b'X-Pycontainer-Protocol: 1\r\n\r\n{"res',
                      b'\0\0\0\r\n\r\n',
                      b'HTTP/1.1 200 OK\r\nX-Pycontainer-Protocol: 1\r\n'
                      b'Content-Length: 2\r\n\r\n{}',
                      b'HTTP/1.1 200 OK\r\nX-Pycontainer-Protocol: 1\r\n'
                      b'Content-Length: 2\r\n\r\n[]'):
            for call in (
                    self.client.list,
                    lambda: self.client.console_attach(self.uuid)):
                with self.subTest(reply=reply):
                    thread = self.answer_once(reply)
                    error = self.assertRaises(errors.AgentUnavailable, call)
                    self.assertIn('went away during', str(error))
                    thread.join(base.PATIENCE)

    def answer_once(self, reply):
        listener = socket.socket(socket.AF_UNIX)
        if os.path.exists(self.path):
            os.unlink(self.path)
        listener.bind(self.path)
        listener.listen()

        def answer():
            with listener:
                sock, _ = listener.accept()
            with sock:
                sock.recv(65536)
                sock.sendall(reply)

        thread = threading.Thread(target=answer)
        thread.start()
        return thread

    def test_with_an_agent_that_does_not_answer_at_all(self):
        self.server.stop(base.PATIENCE)
        self.patch_grace()
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(self.path)
            listener.listen()
            hasty = client.Client(self.path, 0.1)
            error = self.assertRaises(errors.AgentUnavailable, hasty.list)
        self.assertIn("did not answer 'list'", str(error))

    def patch_grace(self):
        original = protocol.GRACE
        protocol.GRACE = 0.1
        self.addCleanup(setattr, protocol, 'GRACE', original)
