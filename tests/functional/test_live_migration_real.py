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

"""Live migration through Nova, of containers as they are.

Both agents are in one network namespace, where the interfaces of a server
cannot be twice. So these servers have none; see tests/cloud for the others.
"""

import os
import pathlib
import shutil
import signal
import subprocess
import tempfile
import uuid

from nova_pycontainer.runtime import errors
from tests import cases
from tests.faults import kernel
from tests.functional import agents
from tests.functional import base
from tests.functional import migration_base

#: Leaves its pid 1 and a number that only a running guest changes.
COUNT = ('setsid sh -c "i=0; while :; do i=\\$((i+1)); echo \\$i > /count; '
         'sleep 0.05; done" </dev/null >/dev/null 2>&1 &')


class RealLiveMigrationTest(migration_base.TestCase):

    def setUp(self):
        if agents.Agents is not agents.Real:
            self.skipTest('containers need root; run tools/run_tests.sh')
        super().setUp()
        for host in base.HOSTS:
            self.periodic('update_available_resource', host)

    def boot(self, **values):
        return super().boot(networks='none', **values)

    def sh(self, server, host, script):
        done = self.agents.client(host).exec(
            server['id'], ['/bin/sh', '-c', script])
        self.assertEqual(0, done['exit_code'], done['stderr'])
        return done['stdout'].decode().strip()

    def counting(self):
        """A server that does something all the time."""
        server = self.boot()
        self.sh(server, 'host1', COUNT)
        self.wait_for(
            lambda: self.sh(server, 'host1', 'cat /count || :'), 'a number')
        return server

    def assert_at(self, server, host):
        """It runs there, and nothing of it is left anywhere else."""
        now = self.api.get_server(server['id'])
        self.assertEqual((host, 'ACTIVE', None), (
            now['OS-EXT-SRV-ATTR:host'], now['status'],
            now['OS-EXT-STS:task_state']))
        before = self.sh(server, host, 'cat /count')
        self.wait_for(
            lambda: self.sh(server, host, 'cat /count') != before,
            'the guest to do something')
        for other in base.HOSTS:
            if other != host:
                self.wait_until_clean(other)
        self.assertEqual([host], self.allocations(server))

    def assert_refused(self, server, words):
        self.wait_for_migration(server, 'error', 'failed')
        self.assertIn(words, self.reason(server))
        self.assert_at(server, 'host1')

    def small(self, host, what, mib):
        """A file system of that size at a directory of an agent's state."""
        top = pathlib.Path(tempfile.mkdtemp(prefix='pyc-small-',
                                            dir=agents.WORK))
        self.addCleanup(shutil.rmtree, top)
        # Nobody but the agent gets through it, and the guests to their files.
        top.chmod(0o711)
        disk, point = top / 'disk.img', top / 'mount'
        with open(disk, 'wb') as f:
            f.truncate(mib << 20)
        point.mkdir()
        for argv in (['mkfs.ext4', '-q', '-F', str(disk)],
                     ['mount', '-o', 'loop', str(disk), str(point)]):
            subprocess.run(argv, check=True, timeout=60)
        self.addCleanup(subprocess.run, ['umount', str(point)], check=True,
                        timeout=60)
        (point / 'lost+found').rmdir()
        directory = self.agents.directory(host) / 'state' / what
        shutil.rmtree(directory)
        directory.symlink_to(point)
        self.restart_agent(host)

    # The image's layer

    def test_there_and_back(self):
        server = self.counting()
        self.migrate(server)
        self.wait_for_migration(server, 'completed')
        self.assert_at(server, 'host2')
        self.migrate(server, 'host1')
        self.wait_for_migration(server, 'completed')
        self.assert_at(server, 'host1')
        self.assertEqual(1, self.agents.imports('host2'))

    def test_image_is_gone(self):
        server = self.counting()
        self.glance.delete(None, self.image)
        self.migrate(server)
        self.wait_for_migration(server, 'completed')
        self.assert_at(server, 'host2')
        self.assertEqual(0, self.agents.imports('host2'))
        layer = self.info(server, 'host2')['layer']
        self.assertIn(f'layer {layer} (image {self.image}) came from another '
                      'host', self.agents.log('host2'))
        self.action(server, 'ACTIVE', 'reboot', {'type': 'HARD'})
        self.sh(server, 'host2', 'true')

    @cases.more
    def test_image_is_gone_and_there_is_no_room(self):
        server = self.counting()
        self.glance.delete(None, self.image)
        self.small('host2', 'layers', 300)
        self.migrate(server)
        self.assert_refused(server, 'the files of the image do not fit on')
        self.assertEqual([], self.agents.client('host2').layer_list())

    # A destination without room

    def test_no_room_for_the_files(self):
        # One whose disk is reserved does not begin to come.
        self.configure_agent('host2', disk_limit='sparse')
        server = self.counting()
        self.sh(server, 'host1', 'dd if=/dev/urandom of=/big bs=1M count=200')
        self.small('host2', 'instances', 128)
        self.migrate(server)
        self.assert_refused(server, 'the files of the guest do not fit on')

    @cases.more
    def test_no_room_for_the_disk(self):
        server = self.counting()
        self.small('host2', 'instances', 128)
        self.migrate(server)
        self.assert_refused(server, 'the disk and the description of the '
                            'guest do not fit on')

    # Hosts that do not go together

    def test_ids_in_use(self):
        server = self.counting()
        here = self.info(server)
        there = self.agents.client('host2')
        # Any server of the image brings its layer.
        self.delete(self.boot(host='host2'))
        other = str(uuid.uuid4())
        there.define(other, {
            **here['spec'], 'base_id': here['base_id'], 'config_drive': None})
        self.migrate(server)
        self.wait_for_migration(server, 'error', 'failed')
        self.assertIn(f'belong to {other}', self.reason(server))
        self.assertIn('Migrate to another host', self.reason(server))
        there.delete(other)
        self.assert_at(server, 'host1')
        self.migrate(server)
        self.wait_for_migration(server, 'completed')
        self.assert_at(server, 'host2')

    def test_agent_of_another_release(self):
        server = self.counting()
        release = self.agents.directory('host2') / 'release'
        release.mkdir()
        (release / 'sitecustomize.py').write_text(
            'from nova_pycontainer.runtime.migration import protocol\n'
            'protocol.VERSION = 2\n')
        self.restart_agent('host2', PYTHONPATH=f'{release}:{agents.ROOT}')
        self.migrate(server)
        self.assert_refused(server, 'speaks version 2')
        self.assertIn('Upgrade nova-pycontainer on', self.reason(server))
        # And after that upgrade.
        self.restart_agent('host2')
        self.migrate(server)
        self.wait_for_migration(server, 'completed')
        self.assert_at(server, 'host2')

    # Abort and force

    def hold(self, server, point):
        """Migrate up to a point of the source's agent.

        :returns: the file that lets it go on
        """
        top = self.agents.directory('host1')
        go, record = top / 'go', top / 'points'
        go.unlink(missing_ok=True)
        self.restart_agent('host1', PYCONTAINER_FAULTS=f'{point}=wait:{go}',
                           PYCONTAINER_FAULT_POINTS=str(record))
        record.unlink(missing_ok=True)
        self.migrate(server)
        self.wait_for(lambda: record.exists() and
                      point in record.read_text().split(), point)
        return go

    def abort(self, server):
        self.api.api_delete(
            f'/servers/{server["id"]}/migrations/{self.record(server).id}',
            check_response_status=[202])

    def wait_for_aborts(self, server, number):
        """Until the source's agent has heard of so many."""
        self.wait_for(lambda: self.agents.log('host1').count(
            f'{server["id"]}: the migration is aborted') == number,
            f'abort {number}')

    def test_abort(self):
        server = self.counting()
        for number, point in enumerate((
                'source.connected', 'source.pass', 'source.frozen',
                'source.dumped', 'source.ready'), 1):
            go = self.hold(server, point)
            self.abort(server)
            self.wait_for_aborts(server, number)
            go.touch()
            self.wait_for_migration(server, 'cancelled')
            self.assertIn('aborted by the operator', self.reason(server))
            self.assert_at(server, 'host1')
        self.migrate(server)
        self.wait_for_migration(server, 'completed')
        self.assert_at(server, 'host2')

    @cases.more
    def test_its_host_loses_its_power(self):
        """The guest and all services of the source end; the host boots."""
        self.flags(resume_guests_state_on_host_boot=True)
        server = self.counting()
        self.restart_agent('host1', PYCONTAINER_FAULTS='source.pass=sleep:60')
        self.migrate(server)
        self.wait_for(
            lambda: getattr(self.record(server), 'status', '') == 'running',
            'the migration')
        self.lose('host1')
        self.agents.stop('host1')
        for pid in kernel.inits_of(server['id']):
            os.kill(pid, signal.SIGKILL)
        self.agents.start('host1')
        self.restart('host1')
        self.wait_for_migration(server, 'failed', 'error')
        # It is started, as the other servers of that host are.
        self.wait_for(
            lambda: self.info(server, 'host1')['state'] == 'running',
            'it runs again')
        self.sh(server, 'host1', COUNT)
        self.wait_for(
            lambda: self.sh(server, 'host1', 'cat /count'), 'a number')
        self.assert_at(server, 'host1')

    @cases.more
    def test_abort_too_late(self):
        server = self.counting()
        go = self.hold(server, 'source.committed')
        self.abort(server)
        self.wait_for(lambda: 'point of no return' in self.reason(server),
                      'the refusal')
        go.touch()
        self.wait_for_migration(server, 'completed')
        self.assert_at(server, 'host2')

    @cases.more
    def test_force_complete_into_post_copy(self):
        self.flags(group='pycontainer', live_migration_bandwidth=2,
                   live_migration_permit_post_copy=True)
        server = self.counting()
        self.sh(server, 'host1', 'setsid sh -c "while :; do '
                'for n in 1 2 3 4; do dd if=/dev/urandom of=/endless\\$n '
                'bs=1M count=2 conv=notrunc; done; done" '
                '</dev/null >/dev/null 2>&1 &')
        self.migrate(server)
        one = self.agents.client('host1')

        def copying():
            # Nova calls it running a moment before the agent knows it.
            if getattr(self.record(server), 'status', '') != 'running':
                return False
            try:
                status = one.migration_status(self.record(server).uuid)
            except errors.ContainerError as e:
                if e.code != 'not_found':
                    raise
                return False
            return status['phase'] == 'copying'

        self.wait_for(copying, 'the first pass')
        self.api.force_complete_migration(
            server['id'], self.record(server).id)
        self.wait_for_migration(server, 'completed')
        self.assertEqual('post-copy', self.agents.client(
            'host2').migration_status(self.record(server).uuid)['strategy'])
        self.assert_at(server, 'host2')
