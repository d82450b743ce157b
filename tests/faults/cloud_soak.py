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

"""Servers come, move and go for long on the two-host cloud, while agents and
nova-computes are killed and restarted.

``python -m tests.faults.cloud_soak --creates 500 --moves 200``

Callers at a time create, pause, suspend, migrate and delete servers through
Nova's API. Each server counts for all of its life, and the count must be
whole. In the first half services are killed, or stopped and started; the last
third, at whose ends there are no servers, shows what the services grow by.
The exit status says whether every promise was kept.
"""

import os
import pathlib
import signal
import sys
import threading
import time

from openstack import exceptions

from tests.cloud import base
from tests.faults import cloud_rig
from tests.faults import kernel
from tests.faults import mixed
from tests.faults import witness

#: Seconds until what was killed is started again.
_SUPERVISOR = 1.0
_SETTLED = 300.0
#: What a service may grow by: caches, pools, what the allocator keeps.
_GROWTH_MIB = 24.0
_DESCRIPTORS = 24
#: Nova's pools of threads fill up to their sizes, which takes long.
_THREADS = {'agent': 8, 'nova-compute': 100}


Broken = mixed.Broken


class Guest:

    def __init__(self, server, hosts):
        self.server, self.id = server, server.id
        self.witness = witness.Witness(hosts, server.id)


class Soak(mixed.Mixed, cloud_rig.Counting):

    callers, most, kill_every = 4, 8, (8.0, 25.0)
    others = ('pause', 'suspend')
    creations = ('created', 'could not be created')
    counted = ('paused', 'suspended', 'nova-computes killed', 'agents killed',
               'restarts', 'verbs refused')

    def setUp(self):
        super().setUp()
        self._hosts = {
            host: cloud_rig.Host(host, host, self) for host in base.HOSTS}
        self._all = []
        #: Sessions are not made for several threads.
        self._clouds = threading.local()
        self.flavor_id = self.admin.compute.find_flavor('pyc.tiny').id
        self.image_id = self.image('busybox').id
        project = self.admin.identity.find_project('demo')
        self.network_id = self.admin.network.find_network(
            'private', project_id=project.id).id
        self.as_demo_admin()
        self.prepare()

    def runTest(self):
        self._before = self._things()
        self.report(*self.phases(self._check_clean, self._figures),
                    self._allowed)

    @staticmethod
    def _allowed(name):
        return (_DESCRIPTORS, _THREADS[name.partition('.')[2]], _GROWTH_MIB)

    @property
    def cloud(self):
        """Of this thread."""
        if not hasattr(self._clouds, 'own'):
            self._clouds.own = base.connect('admin', project_name='demo')
        return self._clouds.own

    def call(self):
        super().call()
        self.cloud.close()

    def kill_one(self):
        kind = self.random.choice(('agent', 'nova-compute'))
        name = f'{self.random.choice(base.HOSTS)}.{kind}'
        if self.random.random() < 0.5:
            os.kill(self.service_pid(name), signal.SIGKILL)
            self.count[f'{kind}s killed'] += 1
        else:
            # As for an upgrade, one host after the other.
            base.cloud_sh('stop', '--grace', '120', name)
            self.count['restarts'] += 1
        time.sleep(_SUPERVISOR)
        base.cloud_sh('start', name)

    # The callers

    def _settled(self, guest_id, *statuses):
        def reached():
            now = self.cloud.compute.get_server(guest_id)
            return now if (now.status in statuses and
                           now.task_state is None) else None

        try:
            return base.wait_for(reached, _SETTLED, f'{statuses}', 0.5)
        except AssertionError as e:
            now = self.cloud.compute.get_server(guest_id)
            raise Broken(f'{guest_id}: {e}; {now.status}, '
                         f'{now.task_state}: {now.fault}') from None

    def create(self, _):
        server = self.cloud.compute.create_server(
            name='soak', image_id=self.image_id, flavor_id=self.flavor_id,
            networks=[{'uuid': self.network_id}],
            availability_zone=f'nova:{self.random.choice(base.HOSTS)}')
        with self.lock:
            self._all.append(server.id)
        now = self._settled(server.id, 'ACTIVE', 'ERROR')
        if now.status == 'ERROR' or not self._begins(now):
            # Its nova-compute was killed, or its agent was.
            self.cloud.compute.delete_server(server.id)
            self._wait_gone(server.id)
            with self.lock:
                self.count['created'] -= 1
                self.count['could not be created'] += 1
            self.gone()
            return
        self.back(Guest(now, [*self._hosts.values()]))

    def _begins(self, server):
        """Start its work; an agent may have to be waited for."""
        deadline = time.monotonic() + _SETTLED
        while time.monotonic() < deadline:
            try:
                self.on_host(
                    server.compute_host, 'pycontainer', 'exec', server.id,
                    '--', '/bin/sh', '-c', witness.COUNT)
                return True
            except base.CommandError:
                time.sleep(1.0)
        return False

    def _refused(self, call, *arguments, **options):
        """Nova refuses what it cannot do now: 409, or 400 of a host that is
        down.
        """
        try:
            call(*arguments, **options)
        except (exceptions.ConflictException,
                exceptions.BadRequestException):
            self.count['verbs refused'] += 1
            time.sleep(0.5)
            return True
        return False

    def _there_and_back(self, guest, there, back, status, name):
        if not self._refused(there, guest.id):
            now = self._settled(guest.id, status, 'ACTIVE')
            while now.status == status:
                self._refused(back, guest.id)
                now = self._settled(guest.id, status, 'ACTIVE')
            self.count[name] += 1
        self._check(guest)
        self.back(guest)

    def pause(self, guest):
        self._there_and_back(guest, self.cloud.compute.pause_server,
            self.cloud.compute.unpause_server, 'PAUSED', 'paused')

    def suspend(self, guest):
        self._there_and_back(guest, self.cloud.compute.suspend_server,
            self.cloud.compute.resume_server, 'SUSPENDED', 'suspended')

    def move(self, guest):
        before = self.cloud.compute.get_server(guest.id).compute_host
        if not self._refused(self.cloud.compute.live_migrate_server, guest.id,
                             block_migration='auto'):
            now = self._settled(guest.id, 'ACTIVE')
            moved = now.compute_host != before
            self.count['migrated' if moved else 'migration failed'] += 1
        self._check(guest)
        self.back(guest)

    def delete(self, guest):
        self._check(guest)
        guest.witness.close()
        self.cloud.compute.delete_server(guest.id)
        self._wait_gone(guest.id)
        if kernel.inits_of(guest.id):
            raise Broken(f'{guest.id} was deleted, and lives')
        self.count['deleted'] += 1
        self.gone()

    def _wait_gone(self, guest_id):
        def gone():
            try:
                self.cloud.compute.get_server(guest_id)
            except exceptions.NotFoundException:
                return True
            return False

        base.wait_for(gone, _SETTLED, f'{guest_id} is deleted', 0.5)

    def _check(self, guest):
        """It runs where Nova says, there alone, and nothing of it is lost."""
        host = self.cloud.compute.get_server(guest.id).compute_host
        if not guest.witness.moves(host, _SETTLED):
            raise Broken(f'{guest.id} does nothing on {host}')
        running = kernel.where_it_runs(
            [*self._hosts.values()], self._hosts[host], guest.id)
        if running != [host]:
            raise Broken(f'{guest.id} is on {host}, and runs on {running}')
        problems = guest.witness.problems(host)
        if problems:
            raise Broken('\n'.join(problems))

    # What is left

    def _things(self):
        """Counts of what a host has for its containers."""
        found = {}
        for name, host in self._hosts.items():
            root = pathlib.Path(f'/proc/{host.pid}/root')
            found[name] = {
                'mounts': len(pathlib.Path(
                    f'/proc/{host.pid}/mountinfo').read_text().splitlines()),
                'links': len(pathlib.Path(
                    f'/proc/{host.pid}/net/dev').read_text().splitlines()),
                'switch ports': len(self.switch_ports(name)),
                'instances': len([*(
                    root / 'var/lib/pycontainer/instances').iterdir()]),
                'control groups': len([
                    path for path in (root / 'sys/fs/cgroup' /
                                      host.cgroup_parent).glob('*')
                    if path.is_dir()])}
        return found

    def _check_clean(self):
        print(self.count, flush=True)
        if self.errors:
            raise Broken(f'{len(self.errors)} errors: ' +
                         '\n'.join(self.errors))
        for host in base.HOSTS:
            self.wait_compute(host)

        def clean():
            # Those of the metadata service, one namespace for a network,
            # come with the first server.
            now = self._things()
            return all(now[host][what] <= count + (
                what in ('mounts', 'links', 'switch ports')) * 3
                for host, counts in self._before.items()
                for what, count in counts.items())

        try:
            base.wait_for(clean, 90, 'nothing is left', 1.0)
        except AssertionError:
            raise Broken(f'left behind: {self._before} → {self._things()}'
                         ) from None
        for host in self._hosts.values():
            left = [text for uuid in self._all for text in host.traces(uuid)]
            if left:
                raise Broken('left behind:\n' + '\n'.join(left))
        for uuid in self._all:
            if self.admin.placement.get(
                    f'/allocations/{uuid}').json()['allocations']:
                raise Broken(f'{uuid} has its allocations still')
        ids = set(self._all)
        ports = [port.id for port in self.admin.network.ports()
                 if port.device_id in ids]
        if ports:
            raise Broken(f'ports left: {ports}')

    def _figures(self):
        return {name: mixed.figures_of(self.service_pid(name))
                for name in (*cloud_rig.AGENTS, *cloud_rig.NOVA)}


if __name__ == '__main__':
    sys.exit(mixed.run(Soak, mixed.arguments(__doc__)))
