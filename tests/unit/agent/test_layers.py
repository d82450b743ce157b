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

"""Images on their way into the agent."""

import hashlib
import os

from nova_pycontainer.agent import protocol
from tests.unit.agent import base

KEY = 'sha512-' + 'a' * 128


class TestLayers(base.AgentTestCase):

    def partial(self):
        return list(self.host.directory.glob('*.partial'))

    def test_an_image_arrives_as_it_was_sent(self):
        data = os.urandom(3_000_001)
        digest = f'sha512:{hashlib.sha512(data).hexdigest()}'
        file = self.dir / 'image'
        file.write_bytes(data)
        with file.open('rb') as f:
            info = self.client.layer_import(
                KEY, f, image='größe & co', max_bytes=10 ** 9,
                digest=digest)
        self.assertEqual(len(data), info['bytes'])
        self.assertEqual(data, (self.host.directory / KEY).read_bytes())
        self.assertTrue(self.client.layer_present(KEY))
        self.assertEqual(
            [{'key': KEY, 'bytes': len(data)}], self.client.layer_list())
        self.client.layer_delete(KEY)
        self.assertFalse(self.client.layer_present(KEY))

    def test_pieces_of_any_size_make_an_image(self):
        parts = [b'', b'a', b'', b'b' * 1_000_000, b'c']
        self.client.layer_import(KEY, iter(parts), image='i')
        self.assertEqual(
            b''.join(parts), (self.host.directory / KEY).read_bytes())

    def test_an_image_of_nothing_arrives(self):
        self.assertEqual(
            0, self.client.layer_import(KEY, [], image='i')['bytes'])

    def test_a_refusal_in_the_middle_stops_the_sender(self):
        sent = []

        def endless():
            while True:
                sent.append(65536)
                yield b'x' * 65536

        self.assert_code(
            'image_too_large', self.client.layer_import, KEY, endless(),
            image='i', max_bytes=1_000_000)
        self.assertEqual([], self.partial())
        self.assertLess(sum(sent), 100_000_000)

    def test_a_layer_that_is_there_needs_no_image(self):
        (self.host.directory / KEY).write_bytes(b'12')

        def endless():
            while True:
                yield b'x' * 65536

        info = self.client.layer_import(KEY, endless(), image='i')
        self.assertEqual(2, info['bytes'])

    def test_a_wrong_digest_is_refused(self):
        self.assert_code(
            'invalid', self.client.layer_import, KEY, [b'abc'], image='i',
            digest='sha512:' + '0' * 128)
        self.assertFalse(self.client.layer_present(KEY))

    def test_a_source_that_fails_leaves_nothing(self):

        class Broken(Exception):
            pass

        def source():
            yield b'x' * 1_000_000
            raise Broken

        self.assertRaises(
            Broken, self.client.layer_import, KEY, source(), image='i')
        self.host.wait_gone('*.partial')
        self.assertFalse(self.client.layer_present(KEY))

    def put(self, body, query='image=i', key=KEY, eof=True, **headers):
        fields = {'Host': 'x', protocol.VERSION_HEADER: '1',
                  'Transfer-Encoding': 'chunked'} | headers
        head = ''.join(f'{k}: {v}\r\n' for k, v in fields.items()
                       if v is not None)
        return self.raw(
            f'PUT /v1/layers/{key}?{query} HTTP/1.1\r\n{head}\r\n'.encode()
            + body, eof)

    def test_an_image_that_breaks_off_is_dropped(self):
        for body in (b'', b'5', b'5\r\n', b'5\r\nab', b'5\r\nabcde',
                     b'5\r\nabcdeX\r\n0\r\n\r\n', b'zz\r\n', b'-5\r\nabcde',
                     b'\r\n'):
            with self.subTest(body=body):
                self.assert_refused(422, 'image_truncated', self.put(body))
                self.assertEqual([], self.partial())
                self.assertFalse(self.client.layer_present(KEY))
        status, _ = self.put(b'5;x=y\r\nabcde\r\n0\r\n\r\n', eof=False)
        self.assertEqual(200, status)

    def test_wrong_parameters_of_an_import_are_refused(self):
        for query in ('', 'image=', 'image=i&max_bytes=x',
                      'image=i&max_bytes=-1', 'image=i&digest=sha512',
                      'image=i&other=1'):
            with self.subTest(query=query):
                self.assert_refused(
                    400, 'invalid', self.put(b'0\r\n\r\n', query))
        self.assert_refused(400, 'invalid', self.put(
            b'', **{'Transfer-Encoding': None, 'Content-Length': '0'}))
