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

import argparse
import os
import pathlib
import random
import signal
import sys
import threading
import time
import unittest

from openstack import exceptions
import prettytable

from tests.cloud import base
from tests.faults import cloud_rig
from tests.faults import kernel
from tests.faults import witness

_CALLERS = 4
_MOST = 8
#: Seconds between two kills, and until the killed one is started again.
_KILL_EVERY = (8.0, 25.0)
_SUPERVISOR = 1.0
_SETTLED = 300.0
#: What a service may grow by: caches, pools, what the allocator keeps.
_GROWTH_MIB = 24.0
_DESCRIPTORS = 24
#: Nova's pools of threads fill up to their sizes, which takes long.
_THREADS = {'agent': 8, 'nova-compute': 100}


class Broken(AssertionError):
    """A promise was not kept."""


class Guest:

    def __init__(self, server, hosts):
        self.server, self.id = server, server.id
        self.witness = witness.Witness(hosts, server.id)


class Soak(cloud_rig.Counting):

    creates, moves, seed = 30, 12, 1

    def setUp(self):
        super().setUp()
        self._hosts = {
            host: cloud_rig.Host(host, host, self) for host in base.HOSTS}
        self._random = random.Random(self.seed)
        self._lock = threading.Lock()
        self._idle, self._population = [], 0
        self._errors, self._all = [], []
        self.flavor_id = self.admin.compute.find_flavor('pyc.tiny').id
        self.image_id = self.image('busybox').id
        project = self.admin.identity.find_project('demo')
        self.network_id = self.admin.network.find_network(
            'private', project_id=project.id).id
        self.as_demo_admin()
        self.count = dict.fromkeys(
            ('created', 'could not be created', 'migrated',
             'migration failed', 'paused', 'suspended', 'deleted',
             'nova-computes killed', 'agents killed', 'restarts',
             'verbs refused'), 0)

    def runTest(self):
        self._before = self._things()
        self._phase(self.creates // 2, self.moves // 2, kill=True)
        # Those that were started last have loaded and opened nothing yet.
        self._phase(self.creates * 2 // 3, self.moves * 2 // 3, kill=False)
        first = self._figures()
        self._phase(self.creates, self.moves, kill=False)
        last = self._figures()
        self._report(first, last)

    def _phase(self, creates, moves, kill):
        """Until so many were created and moved, and all are deleted."""
        self._until = creates, moves
        over = threading.Event()
        killer = threading.Thread(
            target=self._kill, args=(over,), daemon=True)
        if kill:
            killer.start()
        callers = [threading.Thread(target=self._call, daemon=True)
                   for _ in range(_CALLERS)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        over.set()
        if kill:
            killer.join()
        for host in base.HOSTS:
            self.wait_compute(host)
        print(f'{self.count}', flush=True)
        if self._errors:
            raise Broken(f'{len(self._errors)} errors: ' +
                         '\n'.join(self._errors))
        self._check_clean()

    def _kill(self, over):
        while not over.wait(self._random.uniform(*_KILL_EVERY)):
            kind = self._random.choice(('agent', 'nova-compute'))
            name = f'{self._random.choice(base.HOSTS)}.{kind}'
            if self._random.random() < 0.5:
                os.kill(self.service_pid(name), signal.SIGKILL)
                self.count[f'{kind}s killed'] += 1
            else:
                # As for an upgrade, one host after the other.
                base.cloud_sh('stop', '--grace', '120', name)
                self.count['restarts'] += 1
            time.sleep(_SUPERVISOR)
            base.cloud_sh('start', name)

    # The callers

    def _call(self):
        # Sessions are not made for several threads.
        cloud = base.connect('admin', project_name='demo')
        try:
            while not self._errors:
                with self._lock:
                    job, guest = self._next()
                if job is None:
                    return
                if job is not _wait:
                    job(self, cloud, guest)
                else:
                    time.sleep(0.2)
        except BaseException as e:
            self._errors.append(f'{type(e).__name__}: {e}')
        finally:
            cloud.close()

    def _next(self):
        creates, moves = self._until
        started = self.count['created'] + self.count['could not be created']
        moved = self.count['migrated'] + self.count['migration failed']
        done = started >= creates and moved >= moves
        if done and not self._population:
            return None, None
        jobs = []
        if started < creates or (moved < moves and not self._population):
            if self._population < _MOST:
                jobs += [Soak._create] * 3
        if self._idle:
            if moved < moves:
                jobs += [Soak._move] * 4
            if done or started < creates:
                jobs += [Soak._delete] * (2 if not done else 9)
            if not done:
                jobs += [Soak._pause, Soak._suspend]
        if not jobs:
            return _wait, None
        job = self._random.choice(jobs)
        if job is Soak._create:
            # Counted now, so that the others do not make more.
            self._population += 1
            self.count['created'] += 1
            return job, None
        return job, self._idle.pop(self._random.randrange(len(self._idle)))

    def _back(self, guest):
        with self._lock:
            self._idle.append(guest)

    def _settled(self, cloud, guest_id, *statuses):
        def reached():
            now = cloud.compute.get_server(guest_id)
            return now if (now.status in statuses and
                           now.task_state is None) else None

        try:
            return base.wait_for(reached, _SETTLED, f'{statuses}', 0.5)
        except AssertionError as e:
            now = cloud.compute.get_server(guest_id)
            raise Broken(f'{guest_id}: {e}; {now.status}, '
                         f'{now.task_state}: {now.fault}') from None

    def _create(self, cloud, _):
        server = cloud.compute.create_server(
            name='soak', image_id=self.image_id, flavor_id=self.flavor_id,
            networks=[{'uuid': self.network_id}],
            availability_zone=f'nova:{self._random.choice(base.HOSTS)}')
        with self._lock:
            self._all.append(server.id)
        now = self._settled(cloud, server.id, 'ACTIVE', 'ERROR')
        if now.status == 'ERROR' or not self._begins(now):
            # Its nova-compute was killed, or its agent was.
            cloud.compute.delete_server(server.id)
            self._wait_gone(cloud, server.id)
            with self._lock:
                self._population -= 1
                self.count['created'] -= 1
                self.count['could not be created'] += 1
            return
        self._back(Guest(now, [*self._hosts.values()]))

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

    def _there_and_back(self, cloud, guest, there, back, status, name):
        if not self._refused(there, guest.id):
            now = self._settled(cloud, guest.id, status, 'ACTIVE')
            while now.status == status:
                self._refused(back, guest.id)
                now = self._settled(cloud, guest.id, status, 'ACTIVE')
            self.count[name] += 1
        self._check(cloud, guest)
        self._back(guest)

    def _pause(self, cloud, guest):
        self._there_and_back(
            cloud, guest, cloud.compute.pause_server,
            cloud.compute.unpause_server, 'PAUSED', 'paused')

    def _suspend(self, cloud, guest):
        self._there_and_back(
            cloud, guest, cloud.compute.suspend_server,
            cloud.compute.resume_server, 'SUSPENDED', 'suspended')

    def _move(self, cloud, guest):
        before = cloud.compute.get_server(guest.id).compute_host
        if not self._refused(cloud.compute.live_migrate_server, guest.id,
                             block_migration='auto'):
            now = self._settled(cloud, guest.id, 'ACTIVE')
            moved = now.compute_host != before
            self.count['migrated' if moved else 'migration failed'] += 1
        self._check(cloud, guest)
        self._back(guest)

    def _delete(self, cloud, guest):
        self._check(cloud, guest)
        guest.witness.close()
        cloud.compute.delete_server(guest.id)
        self._wait_gone(cloud, guest.id)
        if kernel.inits_of(guest.id):
            raise Broken(f'{guest.id} was deleted, and lives')
        with self._lock:
            self.count['deleted'] += 1
            self._population -= 1

    def _wait_gone(self, cloud, guest_id):
        def gone():
            try:
                cloud.compute.get_server(guest_id)
            except exceptions.NotFoundException:
                return True
            return False

        base.wait_for(gone, _SETTLED, f'{guest_id} is deleted', 0.5)

    def _check(self, cloud, guest):
        """It runs where Nova says, there alone, and nothing of it is lost."""
        host = cloud.compute.get_server(guest.id).compute_host
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
        found = {}
        for name in (*cloud_rig.AGENTS, *cloud_rig.NOVA):
            pid = self.service_pid(name)
            fields = dict(
                line.split(':', 1) for line in pathlib.Path(
                    f'/proc/{pid}/status').read_text().splitlines())
            found[name] = (pid, len(os.listdir(f'/proc/{pid}/fd')),
                           int(fields['Threads']),
                           int(fields['RssAnon'].split()[0]) / 1024)
        return found

    def _report(self, first, last):
        counts = prettytable.PrettyTable(['what', 'how many'], align='l')
        for name, number in self.count.items():
            counts.add_row([name, number])
        print(counts)
        figures = prettytable.PrettyTable(
            ['process', 'descriptors', 'threads', 'memory, MiB'], align='l')
        grown = []
        for name, (pid, *before) in first.items():
            now_pid, *now = last[name]
            figures.add_row([name, *(
                f'{b:.0f} → {n:.0f}' for b, n in zip(before, now))])
            if pid != now_pid:
                grown.append(f'{name} was started again')
            threads = _THREADS[name.partition('.')[2]]
            if any(n > b + more for b, n, more in zip(
                    before, now, (_DESCRIPTORS, threads, _GROWTH_MIB))):
                grown.append(f'{name} has grown: {before} → {now}')
        print(figures, flush=True)
        if grown:
            raise Broken('\n'.join(grown))


_wait = object()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.strip().splitlines()[0])
    parser.add_argument('--creates', type=int, default=500)
    parser.add_argument('--moves', type=int, default=200)
    parser.add_argument('--seed', type=int, default=1)
    arguments = parser.parse_args()
    Soak.creates, Soak.moves = arguments.creates, arguments.moves
    Soak.seed = arguments.seed
    began = time.monotonic()
    result = unittest.TextTestRunner().run(Soak())
    print(f'{time.monotonic() - began:.0f} s, seed {arguments.seed}')
    return 0 if result.wasSuccessful() else 1


if __name__ == '__main__':
    sys.exit(main())
