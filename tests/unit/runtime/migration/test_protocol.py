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

"""What is taken for a message of the other agent."""

import fixtures

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import faults
from nova_pycontainer.runtime.migration import protocol
from tests.unit.runtime.migration import base


class TestControl(base.ChannelTestCase):

    def setUp(self):
        super().setUp()
        self.expect()
        self.connection, theirs = self.pair()
        self.control = protocol.Control(theirs)
        self.addCleanup(self.control._thread.join)
        self.addCleanup(self.connection.abort)

    def receive(self):
        return self.control.receive(base.PATIENCE)

    def refused(self, *frames):
        """What is said of the last of some frames."""
        for frame in frames:
            self.connection.send(frame)
        for _ in frames[:-1]:
            self.receive()
        error = self.assertRaises(protocol.PeerGone, self.receive)
        self.assertEqual('invalid', error.code)
        self.assertTrue(self.control.broken)
        # And nothing after it is taken.
        self.assertRaises(protocol.PeerGone, self.receive)
        return str(error)

    def test_in_turn(self):
        peer = protocol.Control(self.connection)
        self.addCleanup(peer._thread.join)
        peer.send('ready')
        peer.send('running')
        self.assertEqual(
            ['ready', 'running'], [self.receive()['type'] for _ in 'ab'])
        self.control.close()

    def test_of_an_older_agent(self):
        for _ in range(2):
            self.connection.send({'type': 'memory'})
            self.receive()

    def test_twice(self):
        frame = {'type': 'ready', 'number': 1}
        self.assertIn('out of turn', self.refused(frame, frame))

    def test_one_is_missing(self):
        self.assertIn('out of turn', self.refused(
            {'type': 'ready', 'number': 1}, {'type': 'go', 'number': 3}))

    def test_garbage(self):
        self.connection.send_bytes(b'\0\0\0\x04\xff\xfe[{')
        self.assertEqual(
            'invalid', self.assertRaises(
                protocol.PeerGone, self.receive).code)

    def test_no_type(self):
        self.refused({'number': 1})
        self.assertIn('it has no type', str(
            self.assertRaises(protocol.PeerGone, self.receive)))

    def test_other_kinds(self):
        for frame in (
                {'type': 'phase', 'phase': 'gone'},
                {'type': 'phase', 'phase': {}},
                {'type': 'phase'},
                {'type': 'failed', 'error': 'x'},
                {'type': 'begin', 'base_id': True, 'run': {},
                 'paused': False},
                {'type': 'files', 'seq': '1'},
                {'type': 'files', 'seq': 1, 'final': 1},
                {'type': 'dumped', 'external': {}, 'cgroups': [],
                 'ramfs': [], 'moment': {}, 'lazy': 'no'}):
            error = self.assertRaises(
                errors.ContainerError, protocol.check, frame, 1)
            self.assertEqual('invalid', error.code, frame)

    def test_about_something_else(self):
        for seq in (4, 5):
            self.connection.send({'type': 'files', 'seq': seq})
        self.control.expect('files', base.PATIENCE, seq=4)
        error = self.assertRaises(
            errors.ContainerError, self.control.expect, 'files',
            base.PATIENCE, seq=4)
        self.assertIn('of seq 5 instead of 4', str(error))

    def test_a_failure(self):
        """Only that is a word of the other side that it has failed."""
        self.connection.send({'type': 'failed', 'error': errors.ContainerError(
            'no_space', 'it is full').to_dict()})
        error = self.assertRaises(protocol.PeerFailed, self.receive)
        self.assertEqual('no_space', error.code)

    def test_a_failure_of_nobody_knows_what(self):
        self.connection.send({'type': 'failed', 'error': {
            'code': [], 'message': {}, 'uuid': ['x'], 'remedy': 1}})
        error = self.assertRaises(protocol.PeerFailed, self.receive)
        self.assertEqual('internal', error.code)


class TestFaults(base.ChannelTestCase):
    """What the matrix of faults has an agent send."""

    def setUp(self):
        super().setUp()
        self.expect()
        self.connection, self.theirs = self.pair()
        self.plan = {}
        self.useFixture(fixtures.MonkeyPatch(
            'nova_pycontainer.runtime.faults._plan', self.plan))

    def send(self, how):
        self.plan['frame'] = how
        self.connection.send({'type': 'files', 'number': 1, 'seq': 3})
        self.assertEqual({}, self.plan)
        return self.theirs.recv(base.PATIENCE)

    def test_twice(self):
        self.assertEqual(
            self.send('twice'), self.theirs.recv(base.PATIENCE))

    def test_garbage(self):
        self.assertRaises(errors.ContainerError, self.send, 'garbage')

    def test_nonsense(self):
        self.assertEqual(
            {'type': 'files', 'number': 1, 'seq': {'is': 'nothing'}},
            self.send('nonsense'))

    def test_none(self):
        frame = b'\0\0\0\2{}'
        self.assertIs(frame, faults.mangled(frame))
