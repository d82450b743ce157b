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

"""Faults of Nova's services, on the two-host cloud of tools/cloud.sh.

``python -m tests.faults.cloud --steps '^migrate' --faults 'nova-a'``

Here it is nova-compute that is killed, at each step of the agents and of the
driver, while a real Nova asks for a verb; what the runtime does when it is
killed itself is what :mod:`tests.faults.rig` tries.
"""

import argparse
import json
import os
import pathlib
import re
import signal
import sys
import time
import typing
import unittest

from openstack import exceptions

from tests.cloud import base
from tests.cloud import migration_base
from tests.faults import kernel
from tests.faults import points
from tests.faults import table
from tests.faults import witness

#: Between the death of a service and its next start.
_SUPERVISOR = 1.0
_REACHED = 90.0
#: An RPC call that nobody answers any more takes 60 s to fail.
_SETTLED = 240.0
_ENDED = ('completed', 'failed', 'error', 'cancelled')
_NOVA = ('host1.nova-compute', 'host2.nova-compute')
_AGENTS = ('host1.agent', 'host2.agent')
#: Fault → services that are killed; what the step's own one does.
FAULTS: dict[str, tuple[tuple[str, ...], str]] = {
    'nova-a': (_NOVA[:1], 'wait'),
    'nova-b': (_NOVA[1:], 'wait'),
    'novas': (_NOVA, 'wait'),
    'agents-novas': (_NOVA + _AGENTS, 'wait'),
    'own': ((), 'kill'),
    'fails': ((), 'raise'),
}
#: Those of a first start, and of either host in a resize.
_SPAWN = ('check', 'image', 'volumes', 'network', 'plug', 'plug_vifs',
          'config_drive', 'define', 'prepare', 'vif_wait', 'start')
_RESIZE = ('stop', 'offer', 'unplug_vifs')
_FINISH = ('leftovers', 'layer', 'take')
_RESUME = ('network', 'volumes', 'unplug_vifs', 'plug', 'plug_vifs',
           'restore')
#: Whose steps those in nova-compute are.
MODULES = {
    'spawn.py': 'spawn', 'migration_destination.py': 'pre_live_migration',
    'power.py': 'resume', 'resize.py': 'resize',
    'arrival.py': 'finish_migration',
}


def _driver(module, names=None):
    """Steps in nova-compute, as :class:`nova_pycontainer.steps.Steps` calls
    them.

    :param names: those of a verb that has its module not alone
    """
    verb = MODULES[module]
    return list(dict.fromkeys(
        f'{verb}.{s.name}' for s in points.listed('driver')
        if s.module == module and (names is None or s.name in names)))


def _points(*modules):
    return list(dict.fromkeys(
        s.name for s in points.listed()
        if s.module in modules and s.kind == 'point'))


class Verb(typing.NamedTuple):
    """What Nova is asked for.

    :param agent: steps of the agents
    :param driver: steps in nova-compute
    """

    agent: list[str]
    driver: list[str]
    #: Whether the other host has to do with it.
    both: bool = False


def verbs():
    return {
        'spawn': Verb([s for s in points.names('life')
                       if not s.startswith('delete.')],
                      _driver('spawn.py', _SPAWN)),
        'delete': Verb([s for s in points.names('life')
                        if s.startswith('delete.')], []),
        'migrate': Verb(points.names('migration'),
                        _driver('migration_destination.py'), True),
        'suspend': Verb([s for s in _points('runtime/checkpoint.py')
                         if s.startswith('suspend.')], []),
        'resume': Verb([s for s in _points('runtime/checkpoint.py')
                        if s.startswith('resume.')],
                       _driver('power.py', _RESUME)),
        'resize': Verb(_points('runtime/migration/cold.py'),
                       _driver('resize.py', _RESIZE) +
                       _driver('arrival.py', _FINISH),
                       True),
    }


def matrix(wanted='', faults=''):
    """:param wanted, faults: regular expressions; of "VERB STEP" and fault"""
    rows = []
    for name, verb in verbs().items():
        for step in verb.agent:
            for fault in ('nova-a', 'nova-b', 'novas', 'agents-novas'):
                if verb.both or fault == 'nova-a':
                    rows.append((name, step, fault))
        for step in verb.driver:
            rows += [(name, step, fault) for fault in ('own', 'fails')]
    return [row for row in rows if re.search(wanted, ' '.join(row[:2])) and
            re.search(faults, row[2])]


_TITLES = {
    'nova-a': "source's nova-compute killed",
    'nova-b': "destination's nova-compute killed",
    'novas': 'both nova-computes killed',
    'agents-novas': 'all nova-computes and agents killed',
    'own': 'its own nova-compute killed',
    'fails': 'the step fails',
}


def _table(results):
    # How long it took is said of the machine, not of the step.
    plain = {row: r | {'outcome': r['outcome'].split(' (')[0]}
             if r.get('outcome') else r for row, r in results.items()}
    return table.render(
        'python -m tests.faults.cloud',
        [table.Part(name, name, verb.agent + verb.driver, _TITLES)
         for name, verb in verbs().items()],
        plain, matrix())


class Counting(migration_base.MigrationTestCase):
    """With servers that write down one number after the other."""

    def counting(self, **kwargs):
        server = self.create_server(
            'busybox', 'pyc.tiny', host='host1', **kwargs)
        self.inside(server, witness.COUNT)
        return server

    def copies(self, server):
        """Pids of the inits that the kernel has of it, wherever."""
        return kernel.inits_of(server.id)

    def check_count(self, server):
        """Each number once: no line was lost, and none written twice.

        :returns: how many there are
        """
        numbers = [int(line.split()[0]) for line in self.inside(
            server, 'cat /ticks 2>/dev/null || :').splitlines() if line]
        self.assertEqual([*range(1, len(numbers) + 1)], numbers)
        return len(numbers)


class Rig(Counting):
    """``self.row(verb, step, fault)`` tries one.

    The services run with files that say what is to go wrong in them, from
    :meth:`arm_services` until the end of the test.
    """

    def setUp(self):
        super().setUp()
        self.plans = base.CLOUD / 'faults'
        self.plans.mkdir(exist_ok=True)
        self.plans.chmod(0o777)
        self.go = self.plans / 'go'
        self.disarm()
        self.addCleanup(self._normal)
        os.environ['PYCONTAINER_CLOUD_FAULTS'] = str(self.plans)
        self._restart()

    def _restart(self):
        self.restart(*_AGENTS, *_NOVA)
        for host in base.HOSTS:
            self.wait_compute(host)

    def _normal(self):
        del os.environ['PYCONTAINER_CLOUD_FAULTS']
        self._restart()

    def disarm(self):
        for name in (*_NOVA, *_AGENTS):
            for path in (self.plans / name, self.plans / f'{name}.points'):
                path.write_text('')
                path.chmod(0o666)

    def arm(self, services, plan):
        self.disarm()
        self.go.unlink(missing_ok=True)
        for name in services:
            (self.plans / name).write_text(plan)

    def passed(self, services):
        return {step for name in services for step in
                (self.plans / f'{name}.points').read_text().split()}

    # One row

    def row(self, verb, step, fault):
        """:returns: what became of it, in a word"""
        agent = step in verbs()[verb].agent
        services = _AGENTS if agent else _NOVA
        killed, action = FAULTS[fault]
        server = None
        if verb != 'spawn':
            server = (self._of_a_gone_image() if 'layer' in step.split('.')
                      else self.counting())
            if verb == 'resume':
                self.demo.compute.suspend_server(server.id)
                self.wait_server(server.id, 'SUSPENDED')
        self.arm(services, f'{step}=' + (
            f'wait:{self.go}' if action == 'wait' else action))
        server = getattr(self, f'_{verb}')(server)
        base.wait_for(lambda: step in self.passed(services), _REACHED,
                      f'the step {step}')
        for name in killed:
            os.kill(self.service_pid(name), signal.SIGKILL)
        for name in (*_NOVA, *_AGENTS):
            (self.plans / name).write_text('')
        self.go.touch()
        time.sleep(_SUPERVISOR)
        began = time.monotonic()
        # Those that are alive go on as they are.
        for name in (*_AGENTS, *_NOVA):
            base.cloud_sh('start', name)
        outcome = getattr(self, f'_after_{verb}')(server)
        took = time.monotonic() - began
        self._check(server)
        return f'{outcome} ({took:.0f} s)'

    def _of_a_gone_image(self):
        """A server whose layer only its own host has still."""
        image = self.admin.image.create_image(
            'gone', filename=self.image_file('busybox'), disk_format='raw',
            container_format='bare', visibility='public',
            allow_duplicates=True)
        server = self.counting(image_id=image.id)
        self.admin.image.delete_image(image.id)
        layer = self.containers('host1')[server.id]['layer']
        if layer in {found['key'] for found in self.layers('host2')}:
            self.delete_layer('host2', layer)
        return server

    # The verbs

    def _spawn(self, _server):
        return self.create_server('busybox', 'pyc.tiny', host='host1',
                                  wait=False)

    def _delete(self, server):
        self.admin.compute.delete_server(server.id)
        return server

    def _migrate(self, server):
        self.admin.compute.live_migrate_server(
            server.id, block_migration='auto')
        return server

    def _suspend(self, server):
        self.demo.compute.suspend_server(server.id)
        return server

    def _resume(self, server):
        self.demo.compute.resume_server(server.id)
        return server

    def _resize(self, server):
        self.admin.compute.migrate_server(server.id)
        return server

    # What they lead to

    def _settled(self, server, *statuses):
        def reached():
            now = self.admin.compute.get_server(server.id)
            if now.status in statuses and now.task_state is None:
                return now
            return None

        try:
            return base.wait_for(reached, _SETTLED, f'one of {statuses}')
        except AssertionError as e:
            now = self.admin.compute.get_server(server.id)
            raise AssertionError(
                f'{e}; {now.status}, {now.task_state}: {now.fault}') from None

    def _after_spawn(self, server):
        return self._settled(server, 'ACTIVE', 'ERROR').status.lower()

    def _gone(self, server):
        try:
            self.admin.compute.get_server(server.id)
        except exceptions.NotFoundException:
            return True
        return False

    def _after_delete(self, server):
        base.wait_for(lambda: self._gone(server), _SETTLED, 'its end')
        return 'deleted'

    def _after_migrate(self, server):
        base.wait_for(
            lambda: self.migrations(server)[0].status in _ENDED, _SETTLED,
            'the end of the migration')
        now = self._settled(server, 'ACTIVE')
        self.assert_at(server, now.compute_host)
        return {'host1': 'source', 'host2': 'destination'}[now.compute_host]

    def _after_suspend(self, server):
        return self._settled(server, 'ACTIVE', 'SUSPENDED').status.lower()

    _after_resume = _after_suspend

    def _after_resize(self, server):
        now = self._settled(server, 'ACTIVE', 'VERIFY_RESIZE', 'ERROR')
        if now.status == 'VERIFY_RESIZE':
            self.admin.compute.revert_server_resize(server.id)
            self._settled(server, 'ACTIVE')
        elif now.status == 'ERROR':
            self.admin.compute.reset_server_state(server.id, 'active')
            self.demo.compute.reboot_server(server.id, 'HARD')
            self._settled(server, 'ACTIVE')
        return now.status.lower()

    # What holds then

    def _check(self, server):
        if not self._gone(server):
            now = self.admin.compute.get_server(server.id)
            if now.status == 'SUSPENDED':
                self.demo.compute.resume_server(server.id)
                now = self.wait_server(server.id, 'ACTIVE')
            if now.status == 'ACTIVE':
                self._check_runs(server)
            self.delete_server(server.id)
        for host in base.HOSTS:
            base.wait_for(
                lambda host=host: server.id not in self.containers(host),
                _SETTLED, f'nothing of it on {host}')
        left = self.copies(server)
        if left:
            raise AssertionError(f'deleted, and it runs: {left}')
        self.assertEqual({}, self.allocations(server))
        self.assertEqual(
            [], [*self.admin.network.ports(device_id=server.id)])

    def _check_runs(self, server):
        self.assertEqual(1, len(self.copies(server)))
        self.demo.compute.pause_server(server.id)
        self.wait_server(server.id, 'PAUSED')
        self.demo.compute.unpause_server(server.id)
        self.wait_server(server.id, 'ACTIVE')
        before = self.host_of(server)
        self.admin.compute.live_migrate_server(
            server.id, block_migration='auto')
        self.wait_migration(server, 'completed')
        now = self.wait_server(server.id, 'ACTIVE')
        self.assertNotEqual(before, now.compute_host)
        self.assert_at(server, now.compute_host)
        self.assertEqual(1, len(self.copies(server)))
        self.check_count(server)


class Run(Rig):
    """All rows, on one cloud."""

    rows: list[tuple[str, str, str]] = []
    results: dict[tuple[str, ...], dict[str, typing.Any]] = {}
    path: pathlib.Path | None = None

    def runTest(self):
        broken = []
        for number, row in enumerate(self.rows, 1):
            began = time.monotonic()
            result: dict[str, typing.Any] = {'row': row}
            try:
                result['outcome'] = self.row(*row)
            except (AssertionError, base.CommandError,
                    exceptions.SDKException) as e:
                result['broken'] = str(e)
                broken.append(row)
            result['seconds'] = round(time.monotonic() - began, 1)
            self.results[row] = result
            print(f'[{number}/{len(self.rows)}] {" ".join(row)}: '
                  + (result.get('outcome') or f'BROKEN: {result["broken"]}')
                  + f' ({result["seconds"]} s)', flush=True)
            if self.path:
                self.path.write_text(json.dumps([*self.results.values()]))
        self.assertEqual([], broken)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--steps', default='', metavar='REGEX',
                        help='"VERB STEP" is searched')
    parser.add_argument('--faults', default='', metavar='REGEX')
    parser.add_argument('--results', type=pathlib.Path, metavar='FILE',
                        help='add the results to those of former runs')
    parser.add_argument('--missing', action='store_true',
                        help='only what FILE of --results has not, or broken')
    parser.add_argument('--table', type=pathlib.Path, metavar='FILE',
                        help='write the results as reStructuredText')
    parser.add_argument('--list', action='store_true')
    args = parser.parse_args()
    if args.results and args.results.exists():
        Run.results = {tuple(r['row']): r
                       for r in json.loads(args.results.read_text())}
    Run.path = args.results
    Run.rows = [row for row in matrix(args.steps, args.faults)
                if not args.missing or 'broken' in Run.results.get(
                    row, {'broken': ''})]
    if args.list:
        print(*(' '.join(row) for row in Run.rows), sep='\n')
        return 0
    good = True
    # It would start the services again, of another run maybe.
    if Run.rows:
        good = unittest.TextTestRunner(
            verbosity=0).run(Run()).wasSuccessful()
    if args.table:
        args.table.write_text(_table(Run.results))
    return 0 if good else 1


if __name__ == '__main__':
    sys.exit(main())
