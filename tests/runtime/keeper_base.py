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

"""A keeper as a real process, for each test."""

import json
import os
import socket
import subprocess
import tempfile
import time
import uuid as uuidlib

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import keeper_client
from tests import cases

#: Nothing here takes long; this only ends a test that hangs.
PATIENCE = 60.0


def wait_for(condition, what):
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        result = condition()
        if result:
            return result
        time.sleep(0.01)
    raise AssertionError(f'waited {PATIENCE:g} s in vain for {what}')


def descriptors(pid, sockets):
    """What a process has open, without the numbers, once it is quiet.

    A connection that was just closed here may still be open there.

    :param sockets: how many of them are right
    """
    return wait_for(
        lambda: (lambda found: found if sum(
            name.startswith('socket:') for name in found) == sockets
            else None)(open_files(pid)),
        f'{sockets} sockets in {open_files(pid)}')


def open_files(pid):
    found = []
    for number in os.listdir(f'/proc/{pid}/fd'):
        try:
            found.append(os.readlink(f'/proc/{pid}/fd/{number}'))
        except FileNotFoundError:
            pass
    return sorted(found)


class KeeperTestCase(cases.TestCase):

    def setUp(self):
        super().setUp()
        if os.geteuid():
            self.skipTest('the keeper is a root process: run as root')
        directory = tempfile.TemporaryDirectory(prefix='pyc-keeper-')
        self.addCleanup(directory.cleanup)
        self.dir = directory.name
        self.socket = f'{self.dir}/keeper.sock'
        self.start()
        self.client = keeper_client.KeeperClient(self.socket)
        self.uuid = str(uuidlib.uuid4())

    def start(self, **kwargs):
        argv, env = keeper_client.command(self.socket)
        env |= kwargs.pop('env', {})
        self.log = open(f'{self.dir}/log', 'ab')
        self.addCleanup(self.log.close)
        # As a child of ours, so that its end can be awaited.
        self.process = subprocess.Popen(
            [*kwargs.pop('prefix', []), *argv], env=env,
            stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log,
            start_new_session=True, **kwargs)
        self.addCleanup(self.stop)
        wait_for(self.answers, 'the keeper')

    def answers(self):
        client = keeper_client.KeeperClient(self.socket)
        try:
            return client.ping()['pid'] == self.process.pid
        except errors.ContainerError:
            self.assertIsNone(self.process.poll())
            return False

    def stop(self):
        if self.process.poll() is None:
            self.process.terminate()
        self.assertEqual(0, self.process.wait(PATIENCE))
        with open(f'{self.dir}/log') as f:
            self.assertNotIn('Traceback', f.read())

    def read_json(self, name):
        with open(f'{self.dir}/{name}') as f:
            return json.load(f)

    def raw(self):
        """A connection that may send what it likes."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.addCleanup(sock.close)
        sock.settimeout(PATIENCE)
        sock.connect(self.socket)
        return sock

    def assertError(self, code, call, *args, **kwargs):
        with self.assertRaises(errors.ContainerError) as caught:
            call(*args, **kwargs)
        self.assertEqual(code, caught.exception.code, caught.exception)
        return caught.exception
