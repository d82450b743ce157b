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

"""What the agent refuses, and how it says so."""

import json

from nova_pycontainer.agent import handler
from nova_pycontainer.agent import protocol
from nova_pycontainer.runtime import errors
from tests.unit.agent import base


class TestRefusals(base.AgentTestCase):

    def test_another_version_is_refused_by_both_sides(self):
        for version in ('2', '0', 'x', None):
            message = self.assert_refused(501, 'unsupported', self.post(
                'list', {}, **{protocol.VERSION_HEADER: version}))
            self.assertIn('the agent speaks version 1', message)
        # The other way round: an agent of a later release.
        self.patch_version('7')
        error = self.assert_code('unsupported', self.client.list)
        self.assertIn('the client speaks version 1', str(error))
        self.assertIn('the agent version 7', str(error))
        self.define_on_disk()
        self.assert_code(
            'unsupported', self.client.console_attach, self.uuid)

    def patch_version(self, version):
        original = handler.Handler.send_header

        def send_header(self_, name, value):
            original(self_, name, version if name == protocol.VERSION_HEADER
                     else value)

        handler.Handler.send_header = send_header
        self.addCleanup(setattr, handler.Handler, 'send_header', original)

    def define_on_disk(self):
        self.host.define(self.uuid, {})

    def test_an_unknown_verb_is_refused(self):
        for path in ('nosuch', '', 'info/x', '../v1/list', '__init__',
                     'start_container'):
            message = self.assert_refused(
                501, 'unsupported', self.post(path, {}))
            self.assertIn('no verb', message)
        for line in (b'PATCH /v1/list', b'DELETE /v1/list'):
            status, body = self.raw(
                line + b' HTTP/1.1\r\nHost: x\r\n'
                b'X-Pycontainer-Protocol: 1\r\n\r\n')
            self.assertEqual(501, status)
            self.assertEqual('invalid', body['error']['code'])
        status, body = self.raw(
            b'POST /v2/list HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n'
            b'X-Pycontainer-Protocol: 1\r\n\r\n{}')
        self.assertEqual((501, 'unsupported'),
                         (status, body['error']['code']))

    def test_wrong_parameters_are_refused_by_name(self):
        u = self.uuid
        for verb, params, word in (
            ('info', {}, 'uuid'),
            ('info', {'uuid': 'x'}, 'uuid'),
            ('info', {'uuid': '../../etc'}, 'uuid'),
            ('info', {'uuid': f'{u}\n'}, 'uuid'),
            ('info', {'uuid': u.upper()}, 'uuid'),
            ('info', {'uuid': 5}, 'uuid'),
            ('info', {'uuid': u, 'extra': 1}, 'extra'),
            ('info', [], 'object'), ('info', None, 'object'),
            ('stop', {'uuid': u}, 'timeout_s'),
            ('stop', {'uuid': u, 'timeout_s': -1}, 'timeout_s'),
            ('stop', {'uuid': u, 'timeout_s': '5'}, 'timeout_s'),
            ('stop', {'uuid': u, 'timeout_s': 1e9}, 'timeout_s'),
            ('stop', {'uuid': u, 'timeout_s': True}, 'timeout_s'),
            ('define', {'uuid': u, 'spec': 'x'}, 'spec'),
            ('plug', {'uuid': u, 'nics': {}}, 'nics'),
            ('plug', {'uuid': u, 'nics': ['x']}, 'nics/0'),
            ('unplug', {'uuid': u, 'devnames': ['a/b']}, 'devnames/0'),
            ('unplug', {'uuid': u, 'devnames': ['x' * 16]}, 'devnames/0'),
            ('exec', {'uuid': u, 'argv': []}, 'argv'),
            ('exec', {'uuid': u, 'argv': 'sh'}, 'argv'),
            ('exec', {'uuid': u, 'argv': ['a\0b']}, 'argv/0'),
            ('exec', {'uuid': u, 'argv': ['a'], 'stdin': 'text'}, 'stdin'),
            ('exec', {'uuid': u, 'argv': ['a'], 'env': {'A=': ''}}, 'env'),
            ('exec', {'uuid': u, 'argv': ['a'], 'timeout_s': 0},
             'timeout_s'),
            ('layer_present', {'key': '../../etc/passwd'}, 'key'),
            ('events', {'after': 'x', 'timeout_s': 0}, 'after'),
            ('events', {'after': 0, 'timeout_s': 301}, 'timeout_s'),
        ):
            with self.subTest(verb=verb, params=params):
                status, body = self.post(verb, params)
                self.assertEqual(400, status)
                error = errors.ContainerError.from_dict(body['error'])
                self.assertEqual('invalid', error.code)
                self.assertIn(word, str(error))

    def test_a_long_wrong_value_is_not_repeated(self):
        _, body = self.post('define', {
            'uuid': self.uuid, 'spec': 'secret' * 1000})
        self.assertNotIn('secret', json.dumps(body))

    def test_what_is_not_json_is_refused(self):
        for data in (b'', b'x', b'{', b'\xff', b'[' * 100000,
                     b'{"uuid": {"$base64": "!"}}', b'{"x": NaN}',
                     b'{"x": -Infinity}'):
            self.assert_refused(400, 'invalid', self.post('info', data))

    def test_a_body_that_is_too_large_is_not_read(self):
        # Only announced: the answer comes without it.
        message = self.assert_refused(400, 'invalid', self.post(
            'info', b'', Content_Length=str(10 ** 12)))
        self.assertIn('more than', message)
        # And really sent, by a client that learns the reason nevertheless.
        error = self.assert_code(
            'invalid', self.client.exec, self.uuid, ['x'],
            stdin=b'x' * (40 << 20))
        self.assertIn('more than', str(error))

    def test_a_body_without_or_with_a_wrong_length_is_refused(self):
        for value in (None, 'x', '-1', '1e3'):
            self.assert_refused(400, 'invalid', self.post(
                'info', b'{}', Content_Length=value))
        self.assert_refused(400, 'invalid', self.post(
            'info', b'2\r\n{}\r\n0\r\n\r\n', Content_Length=None,
            Transfer_Encoding='chunked'))
        head = (b'POST /v1/info HTTP/1.1\r\nHost: x\r\n'
                b'X-Pycontainer-Protocol: 1\r\nContent-Length: 9\r\n\r\n{}')
        self.assert_refused(400, 'invalid', self.raw(head, eof=True))

    def test_garbage_instead_of_http_is_refused(self):
        for data in (b'\0\1\2\r\n\r\n', b'x\r\n\r\n',
                     b'GET /' + b'x' * 70000 + b' HTTP/1.1\r\n\r\n',
                     b'GET / HTTP/9.9\r\n\r\n',
                     b'GET / HTTP/1.1\r\n' + b'a: b\r\n' * 200 + b'\r\n'):
            status, body = self.raw(data)
            self.assertGreaterEqual(status, 400)
            self.assertEqual('invalid', body['error']['code'])
        self.client.host_info()

    def test_a_time_out_that_is_none_is_refused(self):
        for value in ('0', '-1', 'nan', 'x'):
            self.assert_refused(400, 'invalid', self.post(
                'list', {}, **{protocol.LIMIT_HEADER: value}))
