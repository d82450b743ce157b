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

"""The agent as a process, with real containers, and what its end leaves."""

import json
import os
import pathlib
import pty
import select
import signal
import subprocess
import sys
import time
import uuid as uuidlib

from nova_pycontainer.agent import client as agent_client
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import keeper_client
from tests.runtime import base

BIN = pathlib.Path(sys.executable).parent


class AgentTestCase(base.HostTestCase):
    """``self.host`` is a client here; its verbs have a host's names."""

    def make_host(self):
        self.socket = str(self.config.run_dir / 'agent.sock')
        self.log = self.config.state_dir.parent / 'agent.log'
        self.conf = self.config.state_dir.parent / 'agent.conf'
        self.conf.write_text('[pycontainer]\n' + ''.join(
            f'{name} = {value}\n' for name, value in {
                'state_dir': self.config.state_dir,
                'run_dir': self.config.run_dir,
                'agent_socket': self.socket,
                'agent_group': 'root',
                'oci_runtime_path': self.config.oci_runtime_path,
                'criu_path': self.config.criu_path,
                'cgroup_parent': self.config.cgroup_parent,
                'preflight_at_start': False,
                'disk_limit': self.config.disk_limit,
            }.items()))
        self.start_agent()
        self.addCleanup(self.stop_agent)
        return agent_client.Client(self.socket)

    def spawn_agent(self, **kwargs):
        return subprocess.Popen(
            [BIN / 'pycontainer-agent', '--config-file', self.conf],
            stdin=subprocess.DEVNULL, **kwargs)

    def start_agent(self):
        with self.log.open('ab') as log:
            self.process = self.spawn_agent(stdout=log, stderr=log)
        asked = agent_client.Client(self.socket)

        def answers():
            try:
                return asked.host_info()
            except errors.AgentUnavailable:
                self.assertIsNone(
                    self.process.poll(), self.log.read_text())

        base.wait_for(answers, 'the agent')

    def stop_agent(self):
        if self.process.poll() is None:
            self.process.terminate()
        code = self.process.wait(base.PATIENCE)
        self.assertIn(code, (0, -signal.SIGKILL), self.log.read_text())
        self.assertNotIn('Traceback', self.log.read_text())

    def kill_agent(self):
        self.process.kill()
        self.process.wait(base.PATIENCE)
        self.assertRaises(errors.AgentUnavailable, self.host.list)

    def sh(self, uuid, script, timeout_s=base.PATIENCE, check=True):
        done = self.host.exec(
            uuid, ['/bin/sh', '-c', script], timeout_s=timeout_s)
        if check and done['exit_code']:
            raise AssertionError(f'{script!r}: {done["stderr"]!r}')
        return done['stdout'].decode().strip()

    def script(self, text):
        """Run a container with this script as its init."""
        return self.run_container(init={'argv': ['/bin/sh', '-c', text]})

    def expect(self, stream, text):
        stream.settimeout(base.PATIENCE)
        seen = b''
        while text.encode() not in seen:
            data = stream.recv(4096)
            self.assertTrue(data, f'{seen!r} is all there is')
            seen += data


class LifeTestCase(AgentTestCase):

    def test_a_container_from_its_image_to_its_end(self):
        uuid = self.run_container()
        self.assertEqual('running', self.state(uuid))
        self.assertEqual([uuid], [i['uuid'] for i in self.host.list()])
        self.assertEqual('0', self.sh(uuid, 'id -u'))
        done = self.host.exec(uuid, ['cat'], stdin=b'\0\xff' * 100000)
        self.assertEqual(b'\0\xff' * 100000, done['stdout'])
        self.host.pause(uuid)
        self.assertEqual('paused', self.state(uuid))
        self.host.unpause(uuid)
        self.sh(uuid, 'echo kept > /file')
        self.host.reboot(uuid, 30)
        self.assertEqual('kept', self.sh(uuid, 'cat /file'))
        self.host.stop(uuid, 30)
        self.assertEqual('stopped', self.state(uuid))
        self.host.delete(uuid)
        self.assertEqual([], self.host.list())
        self.assertEqual([], self.traces(uuid))
        self.host.delete(uuid)
        self.assert_code('not_found', self.host.info, uuid)
        self.assert_code('layer_missing', self.host.define, uuid, {
            'layer': 'sha256-' + '0' * 64,
            'resources': {'memory_bytes': 1 << 28}})

    def test_a_guest_cannot_lend_its_modules_to_the_hosts_python(self):
        uuid = self.run_container()
        done = subprocess.run(
            [sys.executable, '-I', '-S', '-c',
             'import sys; print(*sys.path)'],
            capture_output=True, text=True, timeout=base.PATIENCE)
        path = [p for p in done.stdout.split() if not p.endswith('.zip')]
        self.assertTrue(path)
        for directory in path:
            # Modules that the standard library imports when it needs them.
            for module in ('warnings', 'traceback', 'encodings/idna'):
                file = f'{directory}/{module}.py'
                self.sh(uuid, f'mkdir -p $(dirname {file}); '
                        f'echo "open(\'/owned\', \'w\')" > {file}')
        self.assertEqual(
            0, self.host.exec(uuid, ['true'])['exit_code'])
        for argv in (['nosuch'], ['/nosuch'], ['/etc'], ['\udcff']):
            try:
                done = self.host.exec(uuid, argv)
            except errors.ContainerError as e:
                self.assertEqual('invalid', e.code)
                continue
            self.assertIn(done['exit_code'], (125, 126, 127), done)
        self.sh(uuid, '[ ! -e /owned ]')

    def test_a_bad_image_is_refused_and_nothing_stays(self):
        key = 'sha256-' + '1' * 64
        for data, codes in (
                (b'\x89PNG no archive at all' * 1000,
                 ('image_not_archive',)),
                (base.image('busybox').read_bytes()[:-5000],
                 ('image_truncated', 'image_not_archive'))):
            error = self.assertRaises(
                errors.ContainerError, self.host.layer_import, key, [data],
                image='bad', max_bytes=1 << 30)
            self.assertIn(error.code, codes, str(error))
        self.assertFalse(self.host.layer_present(key))
        self.assertNotIn(
            key, [layer['key'] for layer in self.host.layer_list()])

    def test_events_of_a_container_that_ends_by_itself(self):
        before = self.host.events(-1, 0)
        last = before[-1]['seq'] if before else -1
        uuid = self.script('read line; exit 3')
        with self.host.console_attach(uuid) as stream:
            stream.sendall(b'\n')
            found = []
            while len(found) < 2:
                new = self.host.events(last, 60)
                self.assertTrue(new, 'no event came')
                last = new[-1]['seq']
                found += new
        self.assertEqual(
            [('started', uuid), ('stopped', uuid)],
            [(e['type'], e['uuid']) for e in found])
        self.assertEqual(3, found[1]['exit']['code'])


class EndOfAgentTestCase(AgentTestCase):

    def test_kill_9_while_a_container_runs_is_not_noticed_by_it(self):
        uuid = self.script(
            'i=0; while :; do echo tick $i; i=$((i + 1)); sleep 0.2; done')
        self.wait_console(uuid, 'tick 1')
        pid = self.host.info(uuid)['pid']
        self.kill_agent()
        # Its output is kept meanwhile.
        log = self.config.instances_dir / uuid / 'console.log'
        size = log.stat().st_size
        base.wait_for(lambda: log.stat().st_size > size, 'more output')
        self.start_agent()
        info = self.host.info(uuid)
        self.assertEqual(
            ('running', pid), (info['state'], info['pid']))
        self.assertGreater(info['cpu_time_ns'], 0)
        self.assertIn(b'tick 0', self.host.console_log(uuid))
        self.assertEqual('1', self.sh(uuid, 'echo 1'))
        # Every verb is as before.
        self.host.pause(uuid)
        self.host.unpause(uuid)
        ended = self.host.stop(uuid, 0)
        self.assertEqual(signal.SIGKILL, ended['signal'])
        self.host.delete(uuid)
        self.assertEqual([], self.traces(uuid))

    def test_an_exit_while_there_is_no_agent_is_not_lost(self):
        uuid = self.script('echo ready; read line; echo bye; exit 42')
        self.wait_console(uuid, 'ready')
        stream = self.host.console_attach(uuid)
        self.addCleanup(stream.close)
        pid = self.host.info(uuid)['pid']
        self.kill_agent()
        # Through the console, which nobody had to take up again.
        before = time.time()
        stream.sendall(b'\n')
        self.expect(stream, 'bye')
        base.wait_for(lambda: not os.path.exists(f'/proc/{pid}'),
                      'the end of the init')
        self.start_agent()
        info = self.host.info(uuid)
        self.assertEqual('stopped', info['state'])
        self.assertEqual((42, None, False), (
            info['exit']['code'], info['exit']['signal'],
            info['exit']['oom']))
        self.assertGreaterEqual(info['exit']['at'], int(before))
        self.assertIn(b'bye', self.host.console_log(uuid))
        # What it had while it ran was cleaned up by the new agent.
        self.host.prepare(uuid)
        self.host.start_container(uuid)
        self.assertEqual('running', self.state(uuid))

    def test_kill_9_at_any_moment_of_a_start_can_be_repaired(self):
        uuid = str(uuidlib.uuid4())
        self.host.define(uuid, self.spec())
        for delay in (0.005, 0.02, 0.04, 0.08, 0.15):
            child = os.fork()
            if not child:
                # A client in the middle of its request.
                try:
                    agent_client.Client(self.socket).prepare(uuid)
                finally:
                    os._exit(0)
            time.sleep(delay)
            self.kill_agent()
            os.waitpid(child, 0)
            self.start_agent()
            state = self.state(uuid)
            self.assertIn(state, ('defined', 'created', 'stopped'))
            if state == 'created':
                self.host.start_container(uuid)
            else:
                self.host.prepare(uuid)
                self.host.start_container(uuid)
            self.assertEqual('up', self.sh(uuid, 'echo up'))
            self.host.stop(uuid, 0)
        self.host.delete(uuid)
        self.assertEqual([], self.traces(uuid))

    def test_sigterm_ends_it_quietly_and_containers_run_on(self):
        uuid = self.script('read line; sleep 1000')
        pid = self.host.info(uuid)['pid']
        keeper = keeper_client.KeeperClient(self.config.keeper_socket)
        kept = keeper.ping()['pid']
        self.process.terminate()
        self.assertEqual(0, self.process.wait(base.PATIENCE))
        self.assertFalse(os.path.exists(self.socket))
        self.assertIn('the containers run on', self.log.read_text())
        os.kill(pid, 0)
        self.assertEqual(kept, keeper.ping()['pid'])
        self.start_agent()
        self.assertEqual(pid, self.host.info(uuid)['pid'])
        self.assertEqual(kept, keeper.ping()['pid'])

    def test_events_go_on_after_a_restart(self):
        uuid = self.script('read line; sleep 1000')
        last = self.host.events(-1, 0)[-1]['seq']
        self.kill_agent()
        self.start_agent()
        self.assertEqual([], self.host.events(last, 0))
        self.host.pause(uuid)
        found = self.host.events(last, 30)
        self.assertEqual(['paused'], [e['type'] for e in found])
        self.host.unpause(uuid)

    def test_a_second_agent_gives_up_and_harms_nothing(self):
        uuid = self.script('read line; sleep 1000')
        second = self.spawn_agent(
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        said, _ = second.communicate(timeout=base.PATIENCE)
        self.assertEqual(1, second.returncode)
        self.assertIn(b'another agent', said)
        self.assertEqual('running', self.state(uuid))


class CommandTestCase(AgentTestCase):
    """The ``pycontainer`` command."""

    def command(self, *args, code=0, **kwargs):
        done = subprocess.run(
            [BIN / 'pycontainer', '--socket', self.socket, *args],
            capture_output=True, timeout=base.PATIENCE, **kwargs)
        self.assertEqual(code, done.returncode, done.stderr)
        return done

    def json(self, *args, **kwargs):
        return json.loads(self.command(
            *args, '-f', 'json', **kwargs).stdout)

    def test_tables_and_json(self):
        self.assertEqual([], self.json('list'))
        uuid = self.run_container(name='müller\x1b[31m')
        row = self.command('list').stdout.decode()
        self.assertIn(uuid, row)
        self.assertIn('running', row)
        # A tenant's name does not control the operator's terminal.
        self.assertIn('müller\ufffd[31m', row)
        self.assertEqual([uuid], [i['uuid'] for i in self.json('list')])
        self.assertEqual(uuid, self.json('show', uuid[:8])['uuid'])
        self.assertIn(uuid, self.command('show', uuid).stdout.decode())
        self.assertEqual(os.cpu_count(), self.json('host')['cpus'])
        key = self.host.info(uuid)['layer']
        self.assertIn(key, [layer['key'] for layer in self.json('layers')])
        self.assertIn(key, self.command('layers').stdout.decode())
        # It is in use.
        done = self.command('-f', 'json', 'layers', '--delete', key, code=1)
        self.assertEqual(
            'layer_in_use', json.loads(done.stdout)['error']['code'])
        self.assertIn(b'pycontainer: ', done.stderr)

    def test_a_container_is_controlled(self):
        uuid = self.run_container(name='web')
        for verb, state in (('pause', 'paused'), ('unpause', 'running'),
                            ('kill', 'stopped'), ('start', 'running'),
                            ('stop', 'stopped'), ('start', 'running'),
                            ('reboot', 'running')):
            self.command(verb, 'web')
            self.assertEqual(state, self.state(uuid), verb)
        done = self.command('delete', 'web', code=1,
                            stdin=subprocess.DEVNULL)
        self.assertIn(b'--yes', done.stderr)
        self.command('delete', 'web', '--yes')
        self.assertEqual([], self.host.list())
        done = self.command('show', 'web', code=1)
        self.assertIn(b"no container 'web'", done.stderr)

    def test_programs_are_executed(self):
        uuid = self.run_container()
        done = self.command(
            'exec', '--stdin', '--env', 'A=b c', uuid, '--', 'sh', '-c',
            'cat; echo "$A" >&2; exit 7', code=7, input=b'in\0put')
        self.assertEqual((b'in\0put', b'b c\n'), (done.stdout, done.stderr))
        done = self.command('exec', '--timeout', '1', uuid, '--', 'sleep',
                            '1000', code=1)
        self.assertIn(b'did not end within', done.stderr)
        found = json.loads(self.command(
            '-f', 'json', 'exec', uuid, '--', 'echo', 'x').stdout)
        self.assertEqual((0, 'x\n'), (found['exit_code'], found['stdout']))

    def test_the_log_is_printed(self):
        uuid = self.script('echo hello; read line; sleep 1000')
        self.wait_console(uuid, 'hello')
        self.assertIn(b'hello', self.command('logs', uuid).stdout)
        self.assertIn('hello', self.json('logs', uuid)['log'])

    def test_the_console_is_a_terminal(self):
        uuid = self.script('read word; echo "it was $word"; read word; '
                           'exit 0')
        master, slave = pty.openpty()
        self.addCleanup(os.close, master)
        child = subprocess.Popen(
            [BIN / 'pycontainer', '--socket', self.socket, 'console', uuid],
            stdin=slave, stdout=slave, stderr=slave)
        self.addCleanup(child.wait, base.PATIENCE)
        self.addCleanup(child.kill)
        self.wait_terminal(master, b'Ctrl-] ends it')
        os.write(master, b'melon\r')
        self.wait_terminal(master, b'it was melon')
        # Leaving it does not end the container.
        os.write(master, b'\x1d')
        self.assertEqual(0, child.wait(base.PATIENCE))
        os.close(slave)
        self.assertEqual('running', self.state(uuid))

    def test_the_end_of_the_container_ends_the_console(self):
        uuid = self.script('read word; exit 0')
        child = subprocess.Popen(
            [BIN / 'pycontainer', '--socket', self.socket, 'console', uuid],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE)
        _, said = child.communicate(b'x\n', timeout=base.PATIENCE)
        self.assertEqual(0, child.returncode)
        self.assertIn(b'The console has ended', said)

    def wait_terminal(self, master, text):
        seen = b''
        while text not in seen:
            ready, _, _ = select.select([master], [], [], base.PATIENCE)
            self.assertTrue(ready, seen)
            seen += os.read(master, 4096)
