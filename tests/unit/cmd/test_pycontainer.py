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

"""The pycontainer command against an agent that keeps files."""

import contextlib
import io
import json
import os
import pty
import threading
import uuid as uuidlib

from nova_pycontainer.cmd import console
from nova_pycontainer.cmd import pycontainer
from tests.unit.agent import base


class TestCommand(base.AgentTestCase):

    def command(self, *args):
        """:returns: exit code, what it printed, what it complained about"""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = pycontainer.main(['--socket', self.path, *args])
        return code, out.getvalue(), err.getvalue()

    def add(self, name, uuid=None):
        uuid = uuid or str(uuidlib.uuid4())
        self.host.define(uuid, {})
        self.host.change(
            uuid, name=name, pid=None, pids=0, memory_bytes=0,
            cpu_time_ns=0, started_at=None, nics=[])
        return uuid

    def test_format_stands_before_or_after_the_verb(self):
        uuid = self.add('one')
        for args in (['-f', 'json', 'list'], ['list', '-f', 'json'],
                     ['list', '--format=json']):
            code, out, _ = self.command(*args)
            self.assertEqual(0, code)
            self.assertEqual([uuid], [i['uuid'] for i in json.loads(out)])
        self.assertIn('| UUID', self.command('list')[1])

    def test_a_container_is_found_by_uuid_name_or_beginning(self):
        first = self.add('web', '11111111-aaaa-4000-8000-000000000001')
        second = self.add('db', '11111111-bbbb-4000-8000-000000000002')
        for word, uuid in ((first, first), ('web', first), ('db', second),
                           ('11111111-b', second)):
            code, out, _ = self.command('show', word, '-f', 'json')
            self.assertEqual((0, uuid), (code, json.loads(out)['uuid']))
        for word, complaint in (
                ('1111', 'may be any of'), ('111', 'no container'),
                ('mail', 'no container'), ('', 'no container')):
            code, out, err = self.command('show', word)
            self.assertEqual((1, ''), (code, out))
            self.assertIn(complaint, err)

    def test_two_of_one_name_are_not_confused(self):
        self.add('web')
        self.add('web')
        code, _, err = self.command('pause', 'web')
        self.assertEqual(1, code)
        self.assertIn('may be any of', err)

    def test_a_name_is_printed_and_not_obeyed(self):
        self.add('\x1b]0;evil\x07\nname\u202e')
        _, out, _ = self.command('list')
        for character in '\x1b\x07\u202e':
            self.assertNotIn(character, out)
        self.assertEqual(5, len(out.splitlines()))

    def test_an_error_of_the_agent_is_told(self):
        self.add('web')
        code, out, err = self.command('logs', 'web', '-f', 'json')
        self.assertEqual(1, code)
        self.assertEqual('internal', json.loads(out)['error']['code'])
        self.assertTrue(err.startswith('pycontainer: '))
        self.server.stop(base.PATIENCE)
        code, _, err = self.command('list')
        self.assertEqual(1, code)
        self.assertIn('Is pycontainer-agent running', err)

    def test_start_prepares_what_is_not_prepared(self):
        uuid = self.add('web')
        self.assertEqual(0, self.command('start', 'web')[0])
        self.assertEqual('running', self.host.info(uuid)['state'])
        self.assertIn('changes', self.host.info(uuid))


class TestConsole(base.AgentTestCase):

    def test_keys_go_out_and_the_screen_comes_back_until_one_leaves(self):
        self.define()
        master, slave = pty.openpty()
        self.addCleanup(os.close, master)
        self.addCleanup(os.close, slave)
        shown_r, shown_w = os.pipe()
        self.addCleanup(os.close, shown_r)
        self.addCleanup(os.close, shown_w)
        left = []

        def use():
            with self.client.console_attach(self.uuid) as stream:
                with console.raw(slave):
                    ready.set()
                    left.append(console.relay(stream, slave, shown_w))

        ready = threading.Event()
        thread = threading.Thread(target=use)
        thread.start()
        self.assertTrue(ready.wait(base.PATIENCE))
        # Ctrl-C is the container's.
        os.write(master, b'a\x03b')
        seen = b''
        while not seen.endswith(b'B'):
            seen += os.read(shown_r, 100)
        self.assertEqual(b'login: A\x03B', seen)
        os.write(master, b'\x1drest')
        thread.join(base.PATIENCE)
        self.assertEqual([True], left)
