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

"""A former release is replaced by this one, host by host, under load.

``python -m tests.faults.upgrade --from REV``

As root. REV is any revision of the former format that is in the history; two
are the default. The exit status says whether every promise was kept.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import threading
import time
import unittest
import uuid as uuidlib

from nova_pycontainer.agent import client
from tests import echo
from tests.faults import database
from tests.faults import inject
from tests.faults import kernel
from tests.faults import releases
from tests.faults import rig
from tests.faults import soak
from tests.faults import witness
from tests.runtime import base
from tests.runtime import hosts

ADDRESS = '203.0.113.20'
#: Of a migration that takes long enough to be caught.
_SLOW = {'bandwidth': 2 << 20}
_BALLAST = 'dd if=/dev/urandom of=/ballast bs=1M count=24 2>/dev/null'


class Rolling(releases.Releases, soak.Soak):
    """One host after the other, with guests in every state."""

    #: Who make, pause, move and delete guests meanwhile.
    callers = 2

    def runTest(self):
        self.prepare()
        for host in (self.a, self.b):
            self.assertFalse(self.is_new(host))
        before = {h.name: kernel.traces(h, False) for h in (self.a, self.b)}
        self._guests = {}
        self._make_guests()
        self._keepers = {h.name: self.keeper(h) for h in (self.a, self.b)}
        with self._load():
            self._upgrade_a()
            self._mixed()
            self._upgrade_b()
            self._both()
        for uuid, seen in self._guests.items():
            seen.close()
            for host in (self.a, self.b):
                host.delete(uuid)
        left = [text for host in (self.a, self.b) for text in kernel.left(
            before[host.name], host, False)]
        self.assertEqual([], left)
        for host in (self.a, self.b):
            self.assertEqual(self._keepers[host.name], self.keeper(host))
        print(f'{self.rev}: {self.count}', flush=True)

    def prepare(self):
        super().prepare()
        self.refusals |= {'unsupported'}
        for host in (self.a, self.b):
            self._import(host)

    def _import(self, host):
        key, path = base.layer_key('busybox')
        with open(path, 'rb') as f:
            host.layer_import(
                key, iter(lambda: f.read(1 << 20), b''), image='busybox',
                max_bytes=4096 * base.MIB)

    @contextlib.contextmanager
    def _load(self):
        self.until = (10 ** 9, 10 ** 9)
        threads = [threading.Thread(target=self.call, daemon=True)
                   for _ in range(self.callers)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self.until = (0, 0)
            for thread in threads:
                thread.join()
        if self.errors:
            raise soak.Broken(f'{self.errors[0]}\n{self.logs()}')

    # The guests

    def _guest(self, host, address=None):
        uuid = hosts.TwoHostsTestCase.run_container(
            self, host=host, address=address)
        self._guests[uuid] = witness.Witness((self.a, self.b), uuid)
        self.sh(host, uuid, witness.START if address else witness.COUNT)
        base.wait_for(lambda: self._guests[uuid].last(host.name),
                      'the guest to be busy')
        return uuid

    def _make_guests(self):
        self._busy = self._guest(self.b, ADDRESS)
        self._stream = echo.Echo(ADDRESS)
        self._moving = self._guest(self.a)
        self.sh(self.a, self._moving, _BALLAST)
        self._paused = self._guest(self.a)
        self.a.pause(self._paused)
        self._suspended = {}
        for host in (self.a, self.b):
            uuid = self._suspended[host.name] = self._guest(host)
            host.suspend(uuid)
        self._stopped = self._guest(self.a)
        client.Client.stop(self.a, self._stopped, 20)
        self._rescued = self._guest(self.a)
        client.Client.stop(self.a, self._rescued, 20)
        self.a.rescue(self._rescued, {
            'layer': base.layer_key('busybox')[0], 'image_id': 'rescue',
            'init': None, 'config_drive': None})
        self.a.prepare(self._rescued)
        self.a.start_container(self._rescued)

    def _states(self):
        """Of the guests of a."""
        return {uuid: self.a.info(uuid)['state'] for uuid in (
            self._moving, self._paused, self._suspended['a'], self._stopped,
            self._rescued)}

    def _goes_on(self, uuid, host):
        seen = self._guests[uuid]
        self.assertTrue(seen.moves(host.name), f'{uuid} does nothing')
        self.assertEqual([host.name], kernel.where_it_runs(
            (self.a, self.b), host, uuid))
        self.assertEqual([], seen.problems(host.name))

    def _stream_goes_on(self):
        received = self._stream.received
        base.wait_for(lambda: self._stream.received > received + 20 or
                      self._stream.error, 'the stream to go on')
        self.assertIsNone(self._stream.error)

    def _move_guest(self, uuid, source, destination):
        hosts.TwoHostsTestCase.migrate(self, uuid, source, destination)
        self._goes_on(uuid, destination)

    def _verbs(self, host):
        uuid = hosts.TwoHostsTestCase.run_container(self, host=host)
        host.pause(uuid)
        host.unpause(uuid)
        host.suspend(uuid)
        host.resume(uuid)
        self.sh(host, uuid, 'true')
        host.delete(uuid)

    # The upgrade

    def _upgrade_a(self):
        states = self._states()
        # For some time the old agent works with new files.
        self.install(self.a)
        self._verbs(self.a)
        migration = self.prepare_migration(
            self._moving, self.a, self.b, **_SLOW)
        base.wait_for(
            lambda: self.a.migration_status(migration)['phase'] == 'copying',
            'the copy')
        self.upgrade(self.a)
        self.assertEqual(self._keepers['a'], self.keeper(self.a))
        base.wait_for(lambda: self._states() == states,
                      'what was before')
        self._roll_back(self.b, self._moving, migration)
        self._goes_on(self._moving, self.a)
        self._stream_goes_on()
        self._verbs(self.a)

    def _mixed(self):
        """a has this release, b the former one."""
        self._move_guest(self._busy, self.b, self.a)
        self._stream_goes_on()
        self._no_way_back()
        self.assertFalse(kernel.running((self.a,), self._paused))
        self.a.unpause(self._paused)
        self._goes_on(self._paused, self.a)
        self.a.resume(self._suspended['a'])
        self._goes_on(self._suspended['a'], self.a)
        client.Client.stop(self.a, self._rescued, 20)
        self.assertFalse(self.a.unrescue(self._rescued)['rescue'])
        for uuid in self._rescued, self._stopped:
            self.a.prepare(uuid)
            self.attach(self.a, uuid)
            self.a.start_container(uuid)
            lines = self._guests[uuid].last('a')
            self.assertGreater(lines, 0)
            self.assertEqual(
                str(lines), self.sh(self.a, uuid, 'wc -l < /ticks'))

    def _no_way_back(self):
        there = self.b.host_info()['migration']
        name = str(uuidlib.uuid4())
        error = self.is_refused(
            self.a.migration_begin, self._busy, name, there, {})
        self.assertIn('in format 3', error.message)
        self.is_refused(
            self.a.transfer_offer, self._stopped, name, there, {})
        sockets = [f'/proc/{host.pid}/root/run/pyc/agent.sock'
                   for host in (self.a, self.b)]
        done = subprocess.run(
            [sys.executable, '-m', 'nova_pycontainer.cmd.pycontainer',
             '--socket', sockets[0], 'migrate', '--dry-run', '-f', 'json',
             '--to', sockets[1], self._busy], cwd=base.ROOT,
            stdout=subprocess.PIPE, text=True, timeout=120)
        self.assertEqual(1, done.returncode)
        self.assertIn('Upgrade nova-pycontainer on', done.stdout)
        for uuid in self._busy, self._stopped:
            self.assertNotIn(uuid, [c['uuid'] for c in self.b.list()])
        self._goes_on(self._busy, self.a)
        self._stream_goes_on()

    def _upgrade_b(self):
        self.upgrade(self.b, kill=True)
        self.assertEqual(self._keepers['b'], self.keeper(self.b))
        self.assertEqual(
            'suspended', self.b.info(self._suspended['b'])['state'])
        self._verbs(self.b)

    def _both(self):
        for source, there in (self.a, self.b), (self.b, self.a):
            self._move_guest(self._busy, source, there)
            self._stream_goes_on()
        self._move_guest(self._moving, self.a, self.b)
        self.b.resume(self._suspended['b'])
        self._goes_on(self._suspended['b'], self.b)
        self._move_guest(self._suspended['a'], self.a, self.b)
        self._stream.finish()


class Upgrade(inject.Fault):
    """The packages are replaced, and the agent is started again.

    :param kill: it is killed, and not asked to end
    """

    def __init__(self, title, *names, kill):
        super().__init__(title)
        self.names, self._kill = names, kill

    def inject(self, rows):
        for name in self.names:
            host = getattr(rows, name)
            rows.install(host)
            if self._kill:
                host.kill_agent()
            else:
                host.stop_agent()
        return True


FAULTS = {
    f'{how} {"-".join(names)}': Upgrade(
        f'upgrade of {" and ".join(names)}', *names, kill=how == 'kill')
    for how in ('kill', 'stop') for names in (('a',), ('b',), ('a', 'b'))}


class Rows(releases.Releases, rig.Rig):
    """Upgrades in the middle of a migration from a to b, or of a suspend and
    a resume on a: ``row(mode, step, name)``, with a name of FAULTS.
    """

    alone = False

    def fault_of(self, mode, name):
        return FAULTS[name]

    def may_cut(self, step, fault):
        # The copies that agents of former releases leave behind are not
        # silent: the one on the source acknowledges what the guest, which is
        # on the destination by now, never gets, and the one on the destination
        # leads the traffic to itself.
        return {'source.committed': 'a', 'destination.restored': 'b'}.get(
            step) in fault.names

    def check_database(self, host):
        """A guest that an agent of format 3 has brought has lost its locks
        for good. What opens its database then cuts the file that its client
        has mapped, which ends the client if it looks at that moment.
        """
        if self.is_locked(host):
            super().check_database(host)
        else:
            self.unlocked = True
            super().check_database(host, database.CHECK_A_COPY)

    def row(self, mode, step, name):
        self.unlocked = False
        found = super().row(mode, step, name)
        for host in (self.a, self.b):
            if self.is_new(host):
                self.downgrade(host)
        return found

    def migrate(self, uuid, source, destination, **options):
        """To a host of the former release none goes before its upgrade."""
        if self.is_new(source) and not self.is_new(destination):
            self.is_refused(
                source.migration_begin, uuid, str(uuidlib.uuid4()),
                destination.host_info()['migration'], {})
            self.upgrade(destination)
        return super().migrate(uuid, source, destination, **options)


class AllRows(Rows):

    def runTest(self):
        broken = []
        for mode, step, name in self.rows():
            began = time.monotonic()
            try:
                found = self.row(mode, step, name)
            except rig.Broken as e:
                broken.append(f'{mode} {step} {name}')
                found = f'BROKEN: {e}'
            except rig.one_host.Absent:
                found = '-'
            print(f'{self.rev} {mode} {step}, {name}: {found} '
                  f'({time.monotonic() - began:.0f} s)', flush=True)
            if broken:
                # What is left of that one must not be another one's.
                break
        self.assertEqual([], broken)

    def rows(self):
        for step in ('source.connected', 'source.final-pass', 'source.frozen',
                     'source.ready', 'source.committed', 'source.running',
                     'destination.prepared', 'destination.restored',
                     'destination.ready', 'destination.committed',
                     'destination.running'):
            for name in FAULTS:
                if not name.startswith('stop') or '-' not in name:
                    yield 'move', step, name
        for step in ('suspend.frozen', 'suspend.saved', 'resume.restored',
                     'resume.adopted'):
            yield 'suspend', step, 'kill a'


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.strip().splitlines()[0])
    parser.add_argument('--from', dest='revs', action='append',
                        metavar='REV', help='the former release')
    parser.add_argument('--only', choices=('rolling', 'rows'))
    args = parser.parse_args()
    if os.environ.get('PYCONTAINER_UPGRADE') != '1':
        return subprocess.run(
            [hosts.IN_HOST, sys.executable, '-m', 'tests.faults.upgrade',
             *sys.argv[1:]], cwd=base.ROOT,
            env={**os.environ, 'PYCONTAINER_UPGRADE': '1'}).returncode
    tests = unittest.TestSuite()
    for rev in args.revs or (releases.FORMER, releases.LAST):
        for name, kind in (('rolling', Rolling), ('rows', AllRows)):
            if args.only in (None, name):
                test = kind()
                test.rev = rev
                tests.addTest(test)
    result = unittest.TextTestRunner(verbosity=2).run(tests)
    return 0 if result.wasSuccessful() and not result.skipped else 1


if __name__ == '__main__':
    sys.exit(main())
