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


"""Guests come, move and go for long, while agents are killed and restarted.

``python -m tests.faults.soak --creates 500 --moves 200``

As root. Three callers at a time create, pause, migrate and delete guests on
two hosts, and behave as Nova does when an agent goes away. Each guest counts
for all of its life, and the count must be whole. After the first third nobody
is killed: before and after the last one the hosts are empty, and must look
alike.
The exit status says whether every promise was kept.
"""

import contextlib
import os
import pathlib
import subprocess
import sys
import time
import uuid as uuidlib

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import keeper_client
from tests.faults import kernel
from tests.faults import mixed
from tests.faults import witness
from tests.runtime import base
from tests.runtime import hosts

#: Seconds until what was killed is started again.
_SUPERVISOR = 0.5
_END = 150.0
#: What an agent may grow by: caches, and what the allocator keeps.
_GROWTH_MIB = 16.0
#: Descriptors that come and go: clients keep their connections for a while.
_CONNECTIONS = 8


Broken = mixed.Broken


class Guest:

    def __init__(self, uuid, host, everywhere):
        self.uuid, self.host = uuid, host
        self.witness = witness.Witness(everywhere, uuid)


class Soak(mixed.Mixed, hosts.TwoHostsTestCase):

    #: Codes of what a migration may be refused with.
    refusals = frozenset(['network', 'not_found'])
    counted = ('paused', 'kills', 'restarts', 'verbs interrupted')

    def runTest(self):
        self.prepare()
        self.spec()
        self._before = {h.name: kernel.traces(h, False)
                        for h in (self.a, self.b)}
        self.report(*self.phases(self._check_clean, self._figures),
                    self._allowed)

    @staticmethod
    def _allowed(_name):
        return _CONNECTIONS, 0, _GROWTH_MIB

    def _check_clean(self):
        if self.errors:
            raise Broken(f'{len(self.errors)} errors, the first: '
                         f'{self.errors[0]}\n{self.logs()}')
        left = [text for host in (self.a, self.b) for text in kernel.left(
            self._before[host.name], host, False)]
        if left:
            raise Broken('left behind:\n' + '\n'.join(left))

    def kill_one(self):
        host = self.random.choice((self.a, self.b))
        if self.random.random() < 0.5:
            host.kill_agent()
            self.count['kills'] += 1
        else:
            # As for an upgrade, one host after the other.
            host.stop_agent()
            self.count['restarts'] += 1
        time.sleep(_SUPERVISOR)
        host.start_agent(**self.agent_options)

    # The callers

    def _patiently(self, verb, *arguments, **options):
        """As Nova asks for what must become true in the end."""
        deadline = time.monotonic() + _END
        while True:
            try:
                return verb(*arguments, **options)
            except errors.AgentUnavailable:
                self.count['verbs interrupted'] += 1
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    def create(self, _):
        host = self.random.choice((self.a, self.b))
        while True:
            uuid = str(uuidlib.uuid4())
            try:
                self.run_container(host=host, uuid=uuid)
                self.sh(host, uuid, witness.COUNT)
                break
            except errors.AgentUnavailable:
                # Nova deletes what it could not make, and makes it again.
                self.count['verbs interrupted'] += 1
                self._patiently(host.delete, uuid)
        self.back(Guest(uuid, host, (self.a, self.b)))

    def run_container(self, *, host, uuid):
        host.define(uuid, self.spec(memory=64))
        host.prepare(uuid)
        host.start_container(uuid)

    def layer(self, name):
        key, path = base.layer_key(name)
        if not self._patiently(self.a.layer_present, key):
            return super().layer(name)
        return key

    def pause(self, guest):
        self._patiently(guest.host.pause, guest.uuid)
        if kernel.running((self.a, self.b), guest.uuid):
            raise Broken('a paused guest runs')
        self._patiently(guest.host.unpause, guest.uuid)
        self.count['paused'] += 1
        self.back(guest)

    def delete(self, guest):
        self._check(guest)
        guest.witness.close()
        self._patiently(guest.host.delete, guest.uuid)
        if kernel.alive((self.a, self.b), guest.uuid):
            raise Broken(f'{guest.uuid} was deleted, and lives')
        self.count['deleted'] += 1
        self.gone()

    def move(self, guest):
        uuid, source = guest.uuid, guest.host
        there = self.b if source is self.a else self.a
        migration = str(uuidlib.uuid4())
        try:
            info = source.info(uuid)
            endpoint = there.migration_prepare(
                uuid, migration, {**info['spec'], 'base_id': info['base_id']},
                source.host_info()['migration'], {})
            source.migration_begin(uuid, migration, endpoint, {})
        except errors.AgentUnavailable:
            self.count['verbs interrupted'] += 1
        except errors.ContainerError as e:
            if e.code not in self.refusals:
                raise
        if self._has_moved(guest, migration):
            base.wait_for(
                lambda: kernel.running((self.a, self.b), uuid) ==
                [there.name], f'{uuid} to run on {there.name}', _END)
            self._patiently(source.delete, uuid)
            guest.host = there
            self.count['migrated'] += 1
        else:
            self._roll_back(there, uuid, migration)
            self.count['migration failed'] += 1
        self._check(guest)
        self.back(guest)

    def _has_moved(self, guest, migration):
        """As nova_pycontainer.migration asks."""
        deadline = time.monotonic() + _END
        while time.monotonic() < deadline:
            if self._runs_twice(guest.uuid):
                raise Broken(f'{guest.uuid} runs on both hosts')
            try:
                status = self._patiently(
                    guest.host.migration_status, migration, 1.0)
            except errors.ContainerError as e:
                if e.code != 'not_found':
                    raise
                return bool(self._patiently(
                    guest.host.info, guest.uuid)['moved'])
            if status['phase'] == 'completed':
                return True
            if status['phase'] in ('aborted', 'failed'):
                if status['error']['code'] == 'lost':
                    raise Broken(f'{guest.uuid} is lost: {status}')
                return False
        raise Broken(f'{guest.uuid}: its migration never ends')

    def _runs_twice(self, uuid):
        """Looked at on both hosts at once, for less time than a freeze
        takes: one that has just moved has run on both.
        """
        copies = [kernel.Copy(host, uuid) for host in (self.a, self.b)]
        before = [copy._switches() for copy in copies]
        time.sleep(0.1)
        return all(
            copy.inits and not copy.frozen and copy._switches() != was
            for copy, was in zip(copies, before))

    def _roll_back(self, there, uuid, migration):
        """As nova_pycontainer.migration_destination does."""
        with contextlib.suppress(errors.ContainerError):
            self._patiently(there.migration_abort, migration, 'rolled back')
        self._patiently(there.delete, uuid)

    def _check(self, guest):
        if not guest.witness.moves(guest.host.name):
            raise Broken(f'{guest.uuid} does nothing on {guest.host.name}: '
                         f'{self._patiently(guest.host.info, guest.uuid)}')
        running = kernel.where_it_runs(
            (self.a, self.b), guest.host, guest.uuid)
        if running != [guest.host.name]:
            raise Broken(f'{guest.uuid} is on {guest.host.name}, and runs on '
                         f'{running}')
        problems = guest.witness.problems(guest.host.name)
        if problems:
            raise Broken('\n'.join(problems))

    # The figures

    def _figures(self):
        found = {}
        for host in (self.a, self.b):
            keeper = keeper_client.KeeperClient(pathlib.Path(
                f'/proc/{host.pid}/root/run/pyc/keeper.sock')).ping()['pid']
            for name, pid in (('agent', host.agent_pid()),
                              ('keeper', keeper)):
                found[f'{name} of {host.name}'] = mixed.figures_of(pid)
        return found


def main():
    options = mixed.arguments(__doc__)
    if os.environ.get('PYCONTAINER_SOAK') != '1':
        return subprocess.run(
            [hosts.IN_HOST, sys.executable, '-m', 'tests.faults.soak',
             *sys.argv[1:]], cwd=base.ROOT,
            env={**os.environ, 'PYCONTAINER_SOAK': '1'}).returncode
    return mixed.run(Soak, options)


if __name__ == '__main__':
    sys.exit(main())
