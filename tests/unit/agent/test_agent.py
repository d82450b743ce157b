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

"""Agent and client over a real socket."""

import concurrent.futures
import grp
import hashlib
import http.client
import inspect
import json
import os
import pathlib
import pwd
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import uuid as uuidlib

import testtools

from nova_pycontainer.agent import client
from nova_pycontainer.agent import handler
from nova_pycontainer.agent import protocol
from nova_pycontainer.agent import server
from nova_pycontainer.agent import verbs
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import host as real_host
from nova_pycontainer.runtime import migrations
from tests.unit.agent import directory_host

KEY = 'sha512-' + 'a' * 128
PATIENCE = 60


class AgentTestCase(testtools.TestCase):

    def setUp(self):
        super().setUp()
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


class TestVerbs(AgentTestCase):

    def test_every_verb_is_a_method_of_the_runtime_with_these_names(self):
        for name, verb in verbs.VERBS.items():
            with self.subTest(verb=name):
                part, _, method = verb.method.rpartition('.')
                found = [getattr(
                    {'': real_host.Host,
                     'migrations': migrations.Migrations}[part], method)]
                if not part:
                    found.append(
                        getattr(directory_host.DirectoryHost, method))
                extra = {'accept'} if name == 'console_attach' else set()
                given = {p.rstrip('?') for p in verb.properties}
                needed = {p for p in verb.properties if p[-1] != '?'}
                for function in found:
                    signature = inspect.signature(function)
                    for names in given, needed:
                        signature.bind(
                            None, **dict.fromkeys(names | extra))

    def test_every_verb_is_a_method_of_the_client(self):
        for name, verb in verbs.VERBS.items():
            for method in (name, verb.method):
                if hasattr(client.Client, method):
                    break
            else:
                self.fail(f'the client has no {name}')

    def test_a_container_from_its_making_to_its_end(self):
        spec = {'name': 'größe', 'nics': [], 'config_drive': {'a': 'Yg=='}}
        info = self.client.define(self.uuid, spec)
        self.assertEqual(spec, info['spec'])
        self.assertEqual(info, self.client.info(self.uuid))
        self.assertEqual([info], self.client.list())
        nics = [{'devname': 'tap1'}, {'devname': 'tap2'}]
        self.assertIsNone(self.client.plug(self.uuid, nics))
        self.assertIsNone(self.client.unplug(self.uuid, ('tap1',)))
        self.assertEqual([nics[1]], self.client.info(self.uuid)['nics'])
        info = self.client.prepare(self.uuid, {'hostname': 'b'})
        self.assertEqual(
            ('created', {'hostname': 'b'}), (info['state'], info['changes']))
        self.assertEqual(
            'running', self.client.start_container(self.uuid)['state'])
        self.assertEqual('paused', self.client.pause(self.uuid)['state'])
        self.assertEqual('running', self.client.unpause(self.uuid)['state'])
        self.assertEqual(
            {'code': 0, 'signal': None}, self.client.stop(self.uuid, 5))
        self.assertEqual(
            'running', self.client.reboot(self.uuid, 5)['state'])
        self.client.kill(self.uuid)
        self.client.delete(self.uuid, keep_disk=True)
        self.assertEqual('stopped', self.client.info(self.uuid)['state'])
        self.client.delete(self.uuid)
        self.assertEqual([], self.client.list())

    def test_bytes_arrive_as_they_are(self):
        self.define()
        everything = bytes(range(256)) * 4096
        result = self.client.exec(
            self.uuid, ['a', 'b', 'c'], stdin=everything, env={'A': 'b'})
        self.assertEqual(
            {'exit_code': 3, 'stdout': everything[::-1],
             'stderr': b'\xff\0', 'truncated': False}, result)
        log = self.host.directory / self.uuid / 'console.log'
        log.write_bytes(everything)
        self.assertEqual(
            everything[-1000:], self.client.console_log(self.uuid, 1000))

    def test_a_large_config_drive_passes(self):
        drive = {f'f{n}': 'x' * 1048576 for n in range(8)}
        info = self.client.define(self.uuid, {'config_drive': drive})
        self.assertEqual(drive, info['spec']['config_drive'])

    def test_an_error_arrives_with_all_that_it_says(self):
        error = self.assert_code(
            'not_found', self.client.info, self.uuid)
        self.assertEqual(
            {'code': 'not_found', 'uuid': self.uuid, 'step': 'look',
             'message': f'there is no container of instance {self.uuid}',
             'cause': 'no directory', 'remedy': 'Make one'},
            error.to_dict())

    def test_a_bug_is_an_internal_error_and_the_agent_goes_on(self):
        self.define()
        error = self.assert_code(
            'internal', self.client.exec, self.uuid, ['fail'])
        self.assertIn('ZeroDivisionError', error.cause)
        self.assertIn('log of pycontainer-agent', error.remedy)
        self.assertNotIn('Traceback', str(error))
        self.client.host_info()

    def test_many_threads_share_a_client(self):
        uuids = [str(uuidlib.uuid4()) for _ in range(40)]
        with concurrent.futures.ThreadPoolExecutor(20) as pool:
            list(pool.map(
                lambda u: self.client.define(u, {'name': u}), uuids))
            infos = list(pool.map(self.client.info, uuids))
        self.assertEqual(uuids, [i['spec']['name'] for i in infos])


class TestEvents(AgentTestCase):

    def test_a_poll_ends_when_something_happens(self):
        self.define()
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(self.client.events, -1, 300)
            self.client.start_container(self.uuid)
            found = waiting.result(PATIENCE)
        self.assertEqual(
            ('started', self.uuid, None),
            (found[0]['type'], found[0]['uuid'], found[0]['exit']))
        self.client.stop(self.uuid, 1)
        found = self.client.events(found[0]['seq'], 300)
        self.assertEqual(
            [('stopped', {'code': 0})],
            [(e['type'], e['exit']) for e in found])

    def test_a_poll_without_events_ends_empty(self):
        self.assertEqual([], self.client.events(-1, 0))
        self.assertEqual([], self.client.events(-1, 1.5))

    def test_a_poll_goes_on_while_its_client_waits(self):
        self.define()
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(self.client.events, -1, 300)
            # Longer than the agent waits at a time.
            time.sleep(2.5 * handler.POLL_STEP)
            self.client.start_container(self.uuid)
            self.assertEqual(1, len(waiting.result(PATIENCE)))

    def test_polls_do_not_keep_verbs_waiting(self):
        with concurrent.futures.ThreadPoolExecutor(80) as pool:
            polls = [pool.submit(self.client.events, -1, 300)
                     for _ in range(server.MAX_RUNNING + 10)]
            self.client.host_info()
            self.define()
            self.client.start_container(self.uuid)
            for poll in polls:
                self.assertEqual(1, len(poll.result(PATIENCE)))

    def test_the_end_of_the_agent_ends_a_poll(self):
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(self.client.events, -1, 300)
            while not self.server._active:
                time.sleep(0.01)
            self.assertTrue(self.server.stop(PATIENCE))
            # Whether it had been taken yet or not.
            try:
                self.assertEqual([], waiting.result(PATIENCE))
            except errors.AgentUnavailable:
                pass

    def test_a_client_that_went_away_gives_its_place_back(self):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(self.path)
            body = b'{"after": -1, "timeout_s": 300}'
            sock.sendall(
                b'POST /v1/events HTTP/1.1\r\nHost: x\r\n'
                b'X-Pycontainer-Protocol: 1\r\n'
                b'Content-Length: %d\r\n\r\n' % len(body) + body)
            while not self.server._active:
                time.sleep(0.01)
        with self.server._idle:
            self.assertTrue(self.server._idle.wait_for(
                lambda: not self.server._active, PATIENCE))


class TestLayers(AgentTestCase):

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


class TestConsole(AgentTestCase):

    def test_an_attached_console_is_a_raw_stream_that_outlives_the_agent(
            self):
        self.define()
        with self.client.console_attach(self.uuid) as stream:
            stream.settimeout(PATIENCE)
            # What came right behind the answer's head is not lost.
            self.assertEqual(b'login: ', stream.recv(7))
            stream.sendall(b'root\r\n\r\n\0')
            self.assertEqual(b'ROOT\r\n\r\n\0', stream.recv(100))
            self.assertTrue(self.server.stop(PATIENCE))
            stream.sendall(b'still')
            self.assertEqual(b'STILL', stream.recv(100))

    def test_a_console_that_is_not_there_is_an_error(self):
        error = self.assert_code(
            'not_found', self.client.console_attach, self.uuid)
        self.assertEqual('Make one', error.remedy)

    def test_without_an_upgrade_it_is_refused(self):
        self.define()
        self.assert_refused(400, 'invalid', self.post(
            'console_attach', {'uuid': self.uuid}))


class TestRefusals(AgentTestCase):

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
        for line in (b'GET /v1/list', b'DELETE /v1/list'):
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


class TestLimits(AgentTestCase):

    def test_a_slow_verb_is_given_up_and_goes_on(self):
        self.host.gate.clear()
        hasty = client.Client(self.path, 0.2)
        error = self.assert_code('timeout', hasty.host_info)
        self.assertIn('within 0.2 s', str(error))
        self.assertIn('goes on', error.remedy)
        # Others are served meanwhile.
        self.assertEqual([], self.client.list())

    def test_what_a_verb_is_told_to_wait_comes_on_top(self):
        self.define()
        self.host.gate.clear()
        hasty = client.Client(self.path, 1)
        # It uses all of its own second, within the two of the call.
        self.assertEqual(
            {'code': None, 'signal': 9}, hasty.stop(self.uuid, 1))

    def test_verbs_at_work_are_bounded(self):
        self.server.stop(PATIENCE)
        self.serve(max_running=2)
        self.host.gate.clear()
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            busy = [pool.submit(self.client.host_info) for _ in range(2)]
            for _ in busy:
                self.host.wait_entered()
            hasty = client.Client(self.path, 0.2)
            self.assert_code('timeout', hasty.list)
            self.host.gate.set()
            for one in busy:
                self.assertEqual({'cpus': 2}, one.result(PATIENCE))
        self.assertEqual([], self.client.list())

    def test_connections_are_bounded_and_the_rest_is_told(self):
        self.server.stop(PATIENCE)
        made = self.serve(max_connections=3)
        idle = []
        for _ in range(3):
            idle.append(socket.socket(socket.AF_UNIX))
            idle[-1].connect(self.path)
        while made._active < 3:
            time.sleep(0.01)
        error = self.assertRaises(
            errors.AgentUnavailable, self.client.list)
        self.assertIn('too many connections', str(error))
        for sock in idle:
            sock.close()
        with made._idle:
            self.assertTrue(made._idle.wait_for(
                lambda: not made._active, PATIENCE))
        self.assertEqual([], self.client.list())


class TestUnavailable(AgentTestCase):

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
        self.server.stop(PATIENCE)
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(self.path)
        error = self.assertRaises(errors.AgentUnavailable, self.client.list)
        self.assertIn('refused', error.cause)

    def test_with_an_agent_that_goes_away_or_talks_nonsense(self):
        self.server.stop(PATIENCE)
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
                    thread.join(PATIENCE)

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
        self.server.stop(PATIENCE)
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


class TestServing(AgentTestCase):

    def test_a_second_agent_on_the_same_socket_gives_up(self):
        error = self.assert_code(
            'exists', server.AgentServer, self.path, self.host)
        self.assertIn(self.path, str(error))
        # And has not taken the first one's socket away.
        self.assertEqual([], self.client.list())

    def test_a_socket_that_a_killed_agent_left_is_taken_over(self):
        self.server.stop(PATIENCE)
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(self.path)
        self.serve()
        self.assertEqual([], self.client.list())

    def test_to_stop_twice_is_to_stop_once(self):
        self.assertTrue(self.server.stop(PATIENCE))
        self.assertTrue(self.server.stop(PATIENCE))
        self.assertFalse(os.path.exists(self.path))

    def test_a_stop_lets_the_running_verbs_end(self):
        self.host.gate.clear()
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            busy = pool.submit(self.client.host_info)
            self.host.wait_entered()
            self.assertFalse(self.server.stop(0.1))
            self.assertRaises(errors.AgentUnavailable, self.client.list)
            self.host.gate.set()
            self.assertEqual({'cpus': 2}, busy.result(PATIENCE))
        self.assertTrue(self.server.stop(PATIENCE))

    def test_a_directory_that_is_missing_is_an_error(self):
        self.assert_code('internal', server.AgentServer,
                         str(self.dir / 'a/b/c.sock'), self.host)

    def test_a_group_that_is_missing_is_an_error(self):
        error = self.assert_code(
            'invalid', server.AgentServer, str(self.dir / 'other'),
            self.host, 'nosuchgroup')
        self.assertIn('agent_group', error.remedy)


class TestUsers(AgentTestCase):
    """Other users than the agent's own; needs root to become them."""

    def setUp(self):
        super().setUp()
        if os.geteuid():
            self.skipTest('only root can become another user: run as root')
        if not shutil.which('setpriv'):
            self.skipTest('setpriv (util-linux) is not installed')
        self.server.stop(PATIENCE)
        # Any group that is nobody's own will do.
        self.group = grp.getgrnam('games')
        self.nobody = pwd.getpwnam('nobody')
        self.dir.chmod(0o755)
        self.served = self.serve(group=self.group.gr_name)

    def ask(self, *setpriv):
        """List the containers as another user; returns what it says."""
        root = pathlib.Path(client.__file__).parents[2]
        script = (
            'import sys\n'
            'sys.path.insert(0, sys.argv[1])\n'
            'from nova_pycontainer.agent import client\n'
            'from nova_pycontainer.runtime import errors\n'
            'try:\n'
            '    print(client.Client(sys.argv[2]).list())\n'
            'except errors.ContainerError as e:\n'
            '    print(e.code, e)\n')
        done = subprocess.run(
            ['setpriv', f'--reuid={self.nobody.pw_uid}', *setpriv,
             self.python(), '-c', script, str(root), self.path],
            capture_output=True, text=True, timeout=PATIENCE)
        self.assertEqual('', done.stderr)
        return done.stdout.strip()

    def python(self):
        # One that others may execute too.
        real = os.path.realpath(sys.executable)
        return '/usr/bin/python3' if '/root/' in real else real

    def test_the_socket_is_roots_and_the_groups(self):
        found = os.stat(self.path)
        self.assertEqual(0o660, stat.S_IMODE(found.st_mode))
        self.assertEqual(
            (0, self.group.gr_gid), (found.st_uid, found.st_gid))

    def test_a_member_of_the_group_may(self):
        self.assertEqual('[]', self.ask(
            f'--regid={self.nobody.pw_gid}',
            f'--groups={self.group.gr_gid}'))
        self.assertEqual('[]', self.ask(
            f'--regid={self.group.gr_gid}', '--clear-groups'))

    def test_who_is_no_member_cannot_connect(self):
        said = self.ask(f'--regid={self.nobody.pw_gid}', '--clear-groups')
        self.assertIn('agent_unavailable', said)
        self.assertIn('Permission denied', said)
        self.assertIn('agent_group', said)

    def test_who_is_no_member_is_refused_whatever_the_sockets_mode(self):
        os.chmod(self.path, 0o666)
        said = self.ask(f'--regid={self.nobody.pw_gid}', '--clear-groups')
        self.assertIn('forbidden', said)
        self.assertIn(f'user {self.nobody.pw_uid}', said)

    def test_without_a_group_only_root_may(self):
        self.served.stop(PATIENCE)
        self.serve()
        self.assertEqual(
            0o600, stat.S_IMODE(os.stat(self.path).st_mode))
        os.chmod(self.path, 0o666)
        self.assertIn('forbidden', self.ask(
            f'--regid={self.group.gr_gid}', '--clear-groups'))
        self.assertEqual([], self.client.list())
