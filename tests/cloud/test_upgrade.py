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

"""Hosts upgraded one after the other, under servers that are in use.

The former release is really the former one, out of the repository's history:
its agents and its driver. The rest of Nova is the same.
"""

import os
import shutil
import threading

from openstack import exceptions

from tests import cases
from tests.cloud import base
from tests.cloud import sessions
from tests.faults import cloud_rig
from tests.faults import releases

PATIENCE = 120.0


class Load:
    """Makes servers, and deletes them, until it is told to stop."""

    def __init__(self, test):
        self._test = test
        self._stop = threading.Event()
        #: How they ended up, in their order.
        self.found = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        while not self._stop.is_set():
            try:
                self.found.append(self._one())
            except (AssertionError, exceptions.SDKException) as e:
                self.found.append(str(e))

    def _one(self):
        server = self._test.create_server('busybox', 'pyc.tiny', wait=False)
        status = base.wait_for(
            lambda: self._status(server) in ('ACTIVE', 'ERROR') and
            self._status(server), PATIENCE, 'a server of the load')
        self._test.delete_server(server.id)
        return status

    def _status(self, server):
        return self._test.admin.compute.get_server(server.id).status

    def finish(self):
        self._stop.set()
        self._thread.join(2 * PATIENCE)
        return self.found


class UpgradeTest(cloud_rig.Counting):

    def setUp(self):
        releases.skip_without(self, releases.LAST)
        super().setUp()
        self.releases = base.CLOUD / 'releases'
        self.addCleanup(self._normal)
        shutil.rmtree(self.releases, ignore_errors=True)
        self.releases.mkdir(mode=0o755)
        releases.export(releases.LAST, self.releases / 'former')
        os.environ['PYCONTAINER_CLOUD_RELEASES'] = str(self.releases)
        for host in base.HOSTS:
            self._forget_format(host)
            (self.releases / host).symlink_to('former')
            self._restart(host)
            self.assertEqual(3, self.state_format(host))

    def _forget_format(self, host):
        """What the former release could not read: none goes back to it."""
        for layer in self.layers(host):
            self.delete_layer(host, layer['key'])
        base.cloud_sh('stop', f'{host}.nova-compute', f'{host}.agent')
        self.on_host(host, 'rm', '-f', '/var/lib/pycontainer/preflight.json')

    def _restart(self, host):
        """As doc/source/admin/upgrade.rst says: nova-compute ends what it
        has begun, and needs the agent for it.
        """
        nova = f'{host}.nova-compute'
        base.cloud_sh('stop', '--grace', str(PATIENCE), nova)
        self.restart(f'{host}.agent')
        base.cloud_sh('start', nova)
        self.wait_compute(host)

    def _normal(self):
        del os.environ['PYCONTAINER_CLOUD_RELEASES']
        shutil.rmtree(self.releases)
        for host in base.HOSTS:
            self._restart(host)

    def upgrade(self, host):
        """Its packages are replaced under what runs there, and its services
        restarted.
        """
        new = self.releases / 'new'
        new.symlink_to(base.REPO)
        os.replace(new, self.releases / host)
        self._restart(host)
        self.assertEqual(4, self.state_format(host))

    def state_format(self, host):
        """Of its agent, as its nova-compute has told the others."""
        found, = self.admin.compute.get(
            f'/os-hypervisors/detail?hypervisor_hostname_pattern={host}',
            microversion='2.53').json()['hypervisors']
        # The former release does not say it.
        return found['cpu_info']['migration'].get('state_format', 3)

    def move(self, server):
        self.admin.compute.live_migrate_server(
            server.id, block_migration='auto')
        self.wait_migration(server, 'completed')

    def upgrade_under(self, server, host):
        """Upgrade a host while a server comes to it, or leaves it."""
        self.admin.compute.live_migrate_server(
            server.id, block_migration='auto')
        self.upgrade(host)
        self.wait_migration(server, 'completed', 'failed', 'error')
        self.wait_server(server.id, 'ACTIVE')
        self.assertEqual(1, len(self.copies(server)))

    @cases.more
    def test_host_by_host(self):
        compute = self.demo.compute
        talks = self.create_server('debian13', host='host1', name='talks')
        moves, paused, suspended, stopped, resized = (
            self.counting() for _ in range(5))
        address = self.floating_ip(talks)
        self.wait_ssh(address, user='debian')
        session = sessions.Session(address)
        self.addCleanup(session.finish)
        compute.pause_server(paused.id)
        self.wait_server(paused.id, 'PAUSED')
        compute.suspend_server(suspended.id)
        self.wait_server(suspended.id, 'SUSPENDED')
        compute.stop_server(stopped.id)
        self.wait_server(stopped.id, 'SHUTOFF')
        self.admin.compute.migrate_server(resized.id)
        self.wait_server(resized.id, 'VERIFY_RESIZE')
        load = Load(self)
        self.addCleanup(load.finish)

        # One is on its way while its destination is upgraded.
        self.upgrade_under(moves, 'host2')
        if self.host_of(moves) == 'host1':
            self.move(moves)
        # The host that is upgraded takes all, and gives none back.
        self.move(talks)
        self.assert_at(talks, 'host2')
        for server in (talks, moves):
            # There is no third host.
            self.assertRaises(
                exceptions.BadRequestException,
                self.admin.compute.live_migrate_server, server.id,
                block_migration='auto')
            self.assertIn('Upgrade nova-pycontainer on', self.reasons(server))
            self.wait_server(server.id, 'ACTIVE')
            self.assertEqual('host2', self.host_of(server))

        # One is on its way while its source is.
        self.upgrade('host1')
        self.move(talks)
        self.upgrade_under(moves, 'host2')

        session.come()
        base.wait_for(session.come, PATIENCE, 'the session talks')
        self.assertEqual('', session.finish())
        compute.unpause_server(paused.id)
        compute.resume_server(suspended.id)
        compute.start_server(stopped.id)
        self.admin.compute.revert_server_resize(resized.id)
        for server in (paused, suspended, stopped, resized):
            self.wait_server(server.id, 'ACTIVE')
            self.assertEqual('host1', self.host_of(server))
            self.move(server)
            self.assert_at(server, 'host2')
            self.assertEqual(1, len(self.copies(server)))
        for server in (moves, paused, suspended):
            before = self.check_count(server)
            base.wait_for(
                lambda server=server, before=before:
                self.check_count(server) > before, PATIENCE, 'a number')
        found = load.finish()
        print(f'{len(found)} servers meanwhile: {found}')
        self.assertEqual({'ACTIVE'}, set(found))
