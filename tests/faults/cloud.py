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
import functools
import json
import pathlib
import re
import sys
import time
import typing
import unittest

from openstack import exceptions

from tests.cloud import base
from tests.faults import cloud_rig
from tests.faults import inject
from tests.faults import points
from tests.faults import rig
from tests.faults import table

_NOVA, _AGENTS = cloud_rig.NOVA, cloud_rig.AGENTS
_KILLED = cloud_rig.KillServices
#: At the steps of the agents.
SERVICES = {
    'nova-a': _KILLED("source's nova-compute killed", *_NOVA[:1]),
    'nova-b': _KILLED("destination's nova-compute killed", *_NOVA[1:]),
    'novas': _KILLED('both nova-computes killed', *_NOVA),
    'agents-novas': _KILLED(
        'all nova-computes and agents killed', *_NOVA, *_AGENTS),
}
#: At those in nova-compute.
DRIVER = {
    'own': cloud_rig.KillsItself('its own nova-compute killed'),
    'fails': inject.Raise('the step fails'),
}


def _of(faults, *names):
    """Faults of the runtime's matrix."""
    return {name: faults[name] for name in names}


#: What else goes wrong at the steps of the agents, by verb.
_BOTH = ('fails', 'agent-a', 'agent-b', 'copier-a', 'copier-b', 'link-1s',
         'link-30s', 'link-cut', 'disk-a', 'disk-b', 'readonly-a',
         'readonly-b', 'power-a', 'power-b', 'power')
_LIFE = _of(inject.LIFE, 'fails', 'agent-a', 'runtime', 'disk-a',
            'readonly-a', 'power-a')
_SUSPEND = _of(inject.SUSPEND, 'fails', 'agent-a', 'criu-a', 'disk-a',
               'readonly-a', 'power-a')
_MORE = {
    'spawn': _LIFE, 'delete': _LIFE, 'suspend': _SUSPEND, 'resume': _SUSPEND,
    'migrate': _of(inject.MIGRATION, *_BOTH, 'criu-a', 'criu-b', 'memory-b'),
    'resize': _of(inject.COLD, *_BOTH),
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
    'arrival.py': 'finish_migration', 'handover.py': 'post_live_migration',
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


@functools.cache
def verbs():
    return {
        'spawn': Verb([s for s in points.names('life')
                       if not s.startswith('delete.')],
                      _driver('spawn.py', _SPAWN)),
        'delete': Verb([s for s in points.names('life')
                        if s.startswith('delete.')], []),
        'migrate': Verb(rig.steps('move'),
                        _driver('migration_destination.py') +
                        _driver('handover.py'), True),
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


#: Where: what the runtime's matrix tries at every step comes here once in each
#: phase, since what differs is what Nova makes of it.
PHASES = {
    'spawn': ('create', 'start.running'),
    'delete': ('delete.killed',),
    'migrate': ('destination.prepared', 'source.pass', 'source.frozen',
                'destination.restored', 'source.committed', 'source.go'),
    'suspend': ('suspend.dumped',),
    'resume': ('resume.restored', 'resume.committed'),
    'resize': ('offer.serving', 'taking.files'),
}
#: Fault → where the runtime's matrix has found such a program.
_COPIED = ('destination.prepared', 'layer.serving', 'layer.fetching',
           'source.connected', 'source.frozen', 'offer.mounted',
           'offer.serving')
_RUNS = {'copier-a': _COPIED, 'copier-b': _COPIED,
         'runtime': ('create', 'start.created', 'delete.killed')}


def faults_of(verb, step):
    """Name → fault: what may go wrong at a step."""
    if step in verbs()[verb].driver:
        return DRIVER
    services = SERVICES if verbs()[verb].both else _of(SERVICES, 'nova-a')
    if step not in PHASES[verb]:
        return services
    return services | {
        name: fault for name, fault in _MORE[verb].items()
        if step in _RUNS.get(name, [step])}


def matrix(wanted='', faults=''):
    """:param wanted, faults: regular expressions; of "VERB STEP" and fault"""
    return [(name, step, fault)
            for name, verb in verbs().items()
            for step in [*verb.agent, *verb.driver]
            if re.search(wanted, f'{name} {step}')
            for fault in faults_of(name, step)
            if re.search(faults, fault)]


def _table(results):
    # How long it took is said of the machine, not of the step.
    plain = {row: r | {'outcome': r['outcome'].split(' (')[0]}
             if r.get('outcome') else r for row, r in results.items()}
    return table.render(
        'python -m tests.faults.cloud',
        [table.Part(name, name, verb.agent + verb.driver, {
            key: fault.title
            for key, fault in (SERVICES | _MORE[name] | DRIVER).items()})
         for name, verb in verbs().items()],
        plain, matrix())


class Rig(cloud_rig.Rig):
    """``self.row(verb, step, fault)`` tries one."""

    def row(self, verb, step, name):
        """:returns: what became of it, in a word; nothing: it was absent"""
        fault = faults_of(verb, step)[name]
        try:
            return self.try_row(
                verb, step, fault, agent=step in verbs()[verb].agent)
        except cloud_rig.Absent:
            return ''


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
                # Without the traceback that Nova keeps of a fault.
                result['broken'] = str(e)[:500]
                broken.append(row)
                self.recover()
            result['seconds'] = round(time.monotonic() - began, 1)
            self.results[row] = result
            print(f'[{number}/{len(self.rows)}] {" ".join(row)}: '
                  + (f'BROKEN: {result["broken"]}' if 'broken' in result
                     else result['outcome'] or '-')
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
