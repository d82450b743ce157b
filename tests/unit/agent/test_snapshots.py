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

"""Snapshots on their way out of the agent."""

import uuid as uuidlib

from tests.unit.agent import base


class TestSnapshots(base.AgentTestCase):

    def setUp(self):
        super().setUp()
        self.define()
        self.data = bytes(range(256)) * 1000
        (self.host.directory / self.uuid / 'console.log').write_bytes(
            self.data)

    def test_it_arrives_as_it_was_sent(self):
        with self.client.snapshot(self.uuid) as stream:
            got = b''.join(iter(lambda: stream.read(70_000), b''))
            self.assertEqual(b'', stream.read(1))
        self.assertEqual(self.data * 100, got)
        with self.client.snapshot(self.uuid) as stream:
            self.assertEqual(self.data * 100, stream.read())

    def test_an_error_before_the_first_byte_has_its_words(self):
        self.assert_code(
            'not_found', self.client.snapshot, str(uuidlib.uuid4()))
        self.host.fail_after = 0
        error = self.assert_code(
            'aborted', self.client.snapshot, self.uuid)
        self.assertEqual('given up', error.message)

    def test_a_failure_in_the_middle_is_no_end(self):
        for after in (1, 50, 99):
            self.host.fail_after = after
            with self.client.snapshot(self.uuid) as stream:
                self.assert_code('aborted', stream.read)
            with self.client.snapshot(self.uuid) as stream:
                self.assert_code('aborted', lambda: [
                    *iter(lambda: stream.read(1000), b'')])

    def test_a_reader_that_stops_gives_it_up(self):
        with self.client.snapshot(self.uuid) as stream:
            stream.read(1)
        self.host.wait_gone('snapshot.partial')

    def test_nothing_else_can_be_got(self):
        self.assert_refused(501, 'unsupported', self.raw(
            b'GET /v1/layers/x HTTP/1.1\r\nHost: x\r\n'
            b'X-Pycontainer-Protocol: 1\r\n\r\n'))
        self.assert_refused(501, 'unsupported', self.raw(
            b'GET /v1/snapshots/x HTTP/1.1\r\nHost: x\r\n\r\n'))
