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

"""A server and a client over a real socket."""

import http.client
import json
import pathlib
import socket
import tempfile
import threading
import uuid as uuidlib

import fixtures
import testtools

from nova_pycontainer.agent import client
from nova_pycontainer.agent import protocol
from nova_pycontainer.agent import server
from nova_pycontainer.runtime import errors
from tests.unit.agent import directory_host

#: Ends a test that hangs; nothing is measured by it.
PATIENCE = 60


class AgentTestCase(testtools.TestCase):

    def setUp(self):
        super().setUp()
        self.useFixture(fixtures.FakeLogger())
        directory = tempfile.TemporaryDirectory(prefix='pyc-agent-')
        self.addCleanup(directory.cleanup)
        self.dir = pathlib.Path(directory.name)
        self.path = str(self.dir / 'agent.sock')
        (self.dir / 'state').mkdir()
        self.host = directory_host.DirectoryHost(self.dir / 'state')
        self.server = self.serve()
        self.client = client.Client(self.path)
        self.uuid = str(uuidlib.uuid4())

    def serve(self, **kwargs):
        made = server.AgentServer(self.path, self.host, **kwargs)
        thread = threading.Thread(
            target=made.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        self.addCleanup(made.stop, PATIENCE)
        # Before that, or it waits for them.
        self.addCleanup(self.host.gate.set)
        return made

    def define(self):
        self.client.define(self.uuid, {'name': 'x'})
        return self.uuid

    def assert_code(self, code, function, *args, **kwargs):
        error = self.assertRaises(
            errors.ContainerError, function, *args, **kwargs)
        self.assertEqual(code, error.code, str(error))
        return error

    def raw(self, data, eof=False):
        """Send bytes; returns the status and the body of the answer."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(PATIENCE)
            sock.connect(self.path)
            sock.sendall(data)
            if eof:
                sock.shutdown(socket.SHUT_WR)
            response = http.client.HTTPResponse(sock)
            response.begin()
            self.assertEqual(
                '1', response.headers[protocol.VERSION_HEADER])
            return response.status, json.loads(response.read())

    def post(self, verb, body, **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        fields = {'Host': 'x', protocol.VERSION_HEADER: '1',
                  'Content-Length': str(len(data))} | {
                      k.replace('_', '-'): v for k, v in headers.items()}
        head = ''.join(f'{k}: {v}\r\n' for k, v in fields.items()
                       if v is not None)
        return self.raw(f'POST /v1/{verb} HTTP/1.1\r\n{head}\r\n'.encode()
                        + data)

    def assert_refused(self, status, code, answer):
        self.assertEqual(
            (status, code), (answer[0], answer[1]['error']['code']),
            answer[1])
        return answer[1]['error']['message']
