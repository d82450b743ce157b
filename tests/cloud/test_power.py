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

"""Hosts lose their power, and boot again."""

import contextlib
import threading

from openstack import exceptions

from tests import cases
from tests.cloud import base
from tests.cloud import migration_base
from tests.faults import kernel

PATIENCE = 120.0
_MARK = 'echo here > /mark; sync; cat /mark'


class Watch:
    """Where the inits of a server are, all the while.

    :ivar seen: sets of hosts, each that was ever seen
    """

    def __init__(self, uuid):
        self._uuid = uuid
        self.seen = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self):
        while not self._stop.wait(0.02):
            found = kernel.hosts_of(self._uuid)
            if found not in self.seen:
                self.seen.append(found)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exc):
        self._stop.set()
        self._thread.join()


class PowerTest(migration_base.MigrationTestCase):

    def power_off(self, *hosts):
        for host in hosts:
            self.addCleanup(self.power_on, host)
            base.cloud_sh('power-off', host)

    def power_on(self, host):
        with contextlib.suppress(base.CommandError):
            base.cloud_sh('power-on', host)

    def mark(self, server):
        self.assertEqual('here\n', self.inside(server, _MARK))

    def force_down(self, host, down):
        """As whoever has fenced a host says it to Nova."""
        service, = self.admin.compute.services(
            host=host, binary='nova-compute')
        self.admin.compute.update_service_forced_down(
            service, forced=down)

    def _forced_up(self):
        try:
            self.force_down('host1', False)
        except exceptions.BadRequestException:
            return False
        return True

    def boot_on(self, host):
        return self.create_server('busybox', 'pyc.tiny', host=host)

    def test_evacuate(self):
        """The dead host's copy is destroyed before anything of it can run;
        what was not evacuated runs there again.
        """
        gone, stays = self.boot_on('host1'), self.boot_on('host1')
        self.mark(gone)
        self.mark(stays)
        self.power_off('host1')
        self.force_down('host1', True)
        self.addCleanup(self._forced_up)
        self.admin.compute.evacuate_server(gone.id)
        # Since microversion 2.95 it is left stopped.
        self.wait_server(gone.id, 'SHUTOFF')
        self.demo.compute.start_server(gone.id)
        self.wait_server(gone.id, 'ACTIVE')
        self.assertEqual('host2', self.host_of(gone))
        # Nothing is shared: it is made of its image.
        self.assertEqual('', self.inside(gone, 'cat /mark 2>/dev/null || :'))
        self.mark(gone)
        with Watch(gone.id) as watch:
            base.cloud_sh('power-on', 'host1')
            self.wait_gone_from('host1', gone)
            # Nova lets it back when it has said what it has destroyed.
            base.wait_for(self._forced_up, PATIENCE, 'the host is let back')
            self.wait_compute('host1')
            base.wait_for(lambda: self._runs_on('host1', stays), PATIENCE,
                          'the other server runs again')
        self.assertEqual([{'pycontainer-host2'}], watch.seen)
        self.assert_at(gone, 'host2')
        self.assertEqual('here\n', self.inside(gone, 'cat /mark'))
        self.assert_at(stays, 'host1')
        self.assertEqual('here\n', self.inside(stays, 'cat /mark'))
        # And it is a host like any other.
        self.admin.compute.live_migrate_server(
            gone.id, host='host1', block_migration='auto')
        self.wait_migration(gone, 'completed')
        self.assert_at(gone, 'host1')
        self.mark(gone)

    def _runs_on(self, host, server):
        found = self.containers(host).get(server.id)
        return found is not None and found['state'] == 'running'

    @cases.more
    def test_both_hosts(self):
        """All that ran runs again, with its files; what did not, does not."""
        first, second, off, suspended = (
            self.boot_on(host)
            for host in ('host1', 'host2', 'host1', 'host2'))
        for server in (first, second, off, suspended):
            self.mark(server)
        self.demo.compute.stop_server(off.id)
        self.demo.compute.suspend_server(suspended.id)
        self.wait_server(off.id, 'SHUTOFF')
        self.wait_server(suspended.id, 'SUSPENDED')
        self.power_off('host1', 'host2')
        for host in base.HOSTS:
            base.cloud_sh('power-on', host)
        for host, server in (('host1', first), ('host2', second)):
            self.wait_compute(host)
            base.wait_for(
                lambda server=server, host=host: self._runs_on(host, server),
                PATIENCE, 'it runs again')
            self.assert_at(server, host)
            self.assertEqual('here\n', self.inside(server, 'cat /mark'))
        self.assertEqual(set(), kernel.hosts_of(off.id))
        self.assertEqual(set(), kernel.hosts_of(suspended.id))
        self.assertEqual('SHUTOFF',
                         self.admin.compute.get_server(off.id).status)
        self.demo.compute.start_server(off.id)
        self.demo.compute.resume_server(suspended.id)
        for server in (off, suspended):
            self.wait_server(server.id, 'ACTIVE')
            self.assertEqual('here\n', self.inside(server, 'cat /mark'))
