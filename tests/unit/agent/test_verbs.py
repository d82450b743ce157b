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

"""What goes over the socket arrives as it was."""

import concurrent.futures
import errno
import inspect
import socket
import time
import uuid as uuidlib

from nova_pycontainer.agent import client
from nova_pycontainer.agent import handler
from nova_pycontainer.agent import protocol
from nova_pycontainer.agent import server
from nova_pycontainer.agent import verbs
from nova_pycontainer.runtime import checkpoints
from nova_pycontainer.runtime import consoles
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import host as real_host
from nova_pycontainer.runtime import interfaces
from nova_pycontainer.runtime import migrations
from nova_pycontainer.runtime.migration import checks  # noqa: H306
from nova_pycontainer.runtime.migration import preflight
from nova_pycontainer.runtime import quiesce
from nova_pycontainer.runtime import rescue
from nova_pycontainer.runtime import transfers
from nova_pycontainer.runtime import volume_swap
from nova_pycontainer.runtime import volumes
from tests.unit.agent import base
from tests.unit.agent import directory_host


class TestVerbs(base.AgentTestCase):

    def test_every_verb_is_a_method_of_the_runtime_with_these_names(self):
        for name, verb in verbs.VERBS.items():
            with self.subTest(verb=name):
                part, _, method = verb.method.rpartition('.')
                found = [getattr(
                    {'': real_host.Host,
                     'checkpoints': checkpoints.Checkpoints,
                     'checks': checks.Checks,
                     'consoles': consoles.Consoles,
                     'interfaces': interfaces.Interfaces,
                     'volumes': volumes.Volumes,
                     'preflight': preflight.Preflight,
                     'migrations': migrations.Migrations,
                     'quiesces': quiesce.Quiesces,
                     'rescues': rescue.Rescues,
                     'swaps': volume_swap.Swaps,
                     'transfers': transfers.Transfers}[part], method)]
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

    def test_a_full_disk_is_called_so(self):
        error = protocol.internal(OSError(errno.ENOSPC, 'No space left'))
        self.assertEqual('no_space', error.code)
        self.assertIn('Free space', error.remedy)

    def test_many_threads_share_a_client(self):
        uuids = [str(uuidlib.uuid4()) for _ in range(40)]
        with concurrent.futures.ThreadPoolExecutor(20) as pool:
            list(pool.map(
                lambda u: self.client.define(u, {'name': u}), uuids))
            infos = list(pool.map(self.client.info, uuids))
        self.assertEqual(uuids, [i['spec']['name'] for i in infos])


class TestEvents(base.AgentTestCase):

    def test_a_poll_ends_when_something_happens(self):
        self.define()
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(self.client.events, -1, 300)
            self.client.start_container(self.uuid)
            found = waiting.result(base.PATIENCE)
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
            self.assertEqual(1, len(waiting.result(base.PATIENCE)))

    def test_polls_do_not_keep_verbs_waiting(self):
        with concurrent.futures.ThreadPoolExecutor(80) as pool:
            polls = [pool.submit(self.client.events, -1, 300)
                     for _ in range(server.MAX_RUNNING + 10)]
            self.client.host_info()
            self.define()
            self.client.start_container(self.uuid)
            for poll in polls:
                self.assertEqual(1, len(poll.result(base.PATIENCE)))

    def test_the_end_of_the_agent_ends_a_poll(self):
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(self.client.events, -1, 300)
            while not self.server._active:
                time.sleep(0.01)
            self.assertTrue(self.server.stop(base.PATIENCE))
            # Whether it had been taken yet or not.
            try:
                self.assertEqual([], waiting.result(base.PATIENCE))
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
                lambda: not self.server._active, base.PATIENCE))


class TestConsole(base.AgentTestCase):

    def test_an_attached_console_is_a_raw_stream_that_outlives_the_agent(
            self):
        self.define()
        with self.client.console_attach(self.uuid) as stream:
            stream.settimeout(base.PATIENCE)
            # What came right behind the answer's head is not lost.
            self.assertEqual(b'login: ', stream.recv(7))
            stream.sendall(b'root\r\n\r\n\0')
            self.assertEqual(b'ROOT\r\n\r\n\0', stream.recv(100))
            self.assertTrue(self.server.stop(base.PATIENCE))
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
