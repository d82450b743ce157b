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


"""Two hosts on which one row after the other is tried."""

import os
import subprocess
import threading
import time

from nova_pycontainer.runtime import errors
from tests import echo
from tests.faults import after
from tests.faults import cold
from tests.faults import database
from tests.faults import inject
from tests.faults import kernel
from tests.faults import one_host
from tests.faults import points
from tests.faults import witness
from tests.runtime import base
from tests.runtime import hosts

ADDRESS = one_host.ADDRESS
#: Of the file system that a host has its instances on: with little of it a
#: full disk is soon made.
_DISK_MIB = 96
_GUEST_MIB = 32
_SUPERVISOR = 0.5
_BOOT = 3.0
_REACHED = 40.0
_END = 150.0
#: Longer than what a dead link is noticed in.
_CUT_OFF = 75.0

MODES = ('move', 'post-copy', 'cold', 'life', 'suspend')
#: Modes that have modules of their own.
_MODULES = {'cold': 'runtime/migration/cold.py',
            'suspend': 'runtime/checkpoint.py'}
#: Some seconds for the pages that follow the guest.
_OPTIONS = {'move': {}, 'post-copy': {
    'strategy': 'post-copy', 'permit_post_copy': True,
    'bandwidth': 3 << 20}}
#: What a source says when nobody has the guest any more.
_LOST = 'lost'
#: The kernel has killed processes of it for lack of memory.
_STARVED = ', processes killed for lack of memory'
#: Of a guest that has ended with the power of its host: what it was there.
_ENDED = {'a': 'ended on source', 'b': 'ended on destination'}


class Broken(AssertionError):
    """A promise was not kept."""


def steps(mode):
    if mode in _MODULES:
        return [s.name for s in points.listed('verbs')
                if s.module == _MODULES[mode]]
    found = points.names('life' if mode == 'life' else 'migration')
    # Of pre-copy, which is for guests that are larger than these: see
    # tests/runtime/test_migration_precopy.py.
    return [name for name in found if name != 'source.round']


def faults(mode):
    found = {'life': inject.LIFE, 'suspend': inject.SUSPEND,
             'cold': inject.COLD}.get(mode, inject.MIGRATION)
    return {name: fault for name, fault in found.items()
            if mode == 'post-copy' or name != 'pages'}


class Rig(cold.Cold, one_host.OneHost, after.After, database.Guests,
          hosts.TwoHostsTestCase):
    """``self.row(mode, step, fault)`` tries one."""

    #: Whether the kernel's settings are these hosts' alone.
    alone = True
    #: Between the hosts.
    link = 'hostlink'

    def setUp(self):
        self._hosts = []
        super().setUp()
        self.plan_go = self.top / 'go'
        for host in (self.a, self.b):
            self.addCleanup(self.fault_heal)
            self.plan(host).write_text('')
        self._finished = threading.Event()
        self.fault = None

    def _host(self, name, address):
        made = super()._host(name, address)
        # Layers that are missing, and are fetched, are part of it.
        (made.directory / 'state' / 'layers').unlink()
        made.record = self.top / 'points'
        made.faults = f'@{self.plan(made)}'
        instances = made.directory / 'state' / 'instances'
        instances.mkdir(mode=0o700)
        disk = made.directory / 'disk.img'
        base.make_file_system(disk, _DISK_MIB, '-m', '0')
        self._mount(made)
        return made

    def spec(self, *args, **kwargs):
        made = super().spec(*args, **kwargs)
        # What a container is promised is taken from the little there is.
        made['resources']['disk_bytes'] = _GUEST_MIB << 20
        return made

    @staticmethod
    def _mount(host):
        host.run('mount', '-o', 'loop', str(host.directory / 'disk.img'),
                 str(host.directory / 'state' / 'instances'))

    def power_off(self, host):
        # A machine without power sends no last words, as the sockets of
        # killed processes do.
        host.run('ip', 'link', 'set', 'uplink', 'down')
        host.run('ip', 'link', 'set', 'hostlink', 'down', check=False)
        loops = kernel.loops(host)
        host.power_off(lambda: kernel.processes(host))
        # Those that are not mounted outlive the namespaces.
        for device, file in loops.items():
            if file.parent.name in kernel.backing_file(device):
                subprocess.run(['losetup', '--detach', device], timeout=30,
                               stderr=subprocess.DEVNULL)

    def _power_on(self, *hosts_):
        for host in hosts_:
            host.power_on()
            self._mount(host)
        # The kernel removes links some time after their namespaces.
        for host in (self.a, self.b):
            host.run('ip', 'link', 'del', 'hostlink', check=False,
                     stderr=subprocess.DEVNULL)
        self._connect_hosts()
        for host in hosts_:
            subprocess.run(
                ['ip', 'link', 'del', f'up{host.name}{os.getpid()}'],
                timeout=30, stderr=subprocess.DEVNULL)
            self._connect_uplink(host)

    @staticmethod
    def plan(host):
        return host.directory / 'plan'

    # For the faults

    def passed(self):
        """The points that were passed, in their order."""
        try:
            return (self.top / 'points').read_text().split()
        except FileNotFoundError:
            return []

    def over(self):
        """Whether what was begun has ended."""
        return self._finished.is_set()

    def fault_heal(self):
        fault, self.fault = self.fault, None
        if fault is not None:
            fault.heal(self)

    # One row

    def row(self, mode, step, name):
        """Try one fault at one step.

        :returns: what became of the guest, in a word
        :raises Broken: a promise was not kept
        :raises Absent: the fault does not make sense there
        """
        fault = self.fault_of(mode, name)
        if one_host.ends_with_criu(step, name, mode):
            raise one_host.Absent
        self.plan_go.unlink(missing_ok=True)
        (self.top / 'points').unlink(missing_ok=True)
        self._finished.clear()
        self.settled = None
        self.killed = 0
        action = (f'wait:{self.plan_go}' if fault.action == 'wait'
                  else fault.action)
        self._before = {
            h.name: kernel.traces(h, self.alone) for h in (self.a, self.b)}
        runner = {'life': self._life, 'suspend': self._suspend,
                  'cold': self._cold}.get(mode, self._migration)
        try:
            return runner(mode, step, fault, f'{step}={action}')
        except (AssertionError, errors.ContainerError) as e:
            raise Broken(f'{type(e).__name__}: {e}\n{self.logs()}') from e
        finally:
            self.plan_go.touch()
            self.fault_heal()

    def fault_of(self, mode, name):
        return faults(mode)[name]

    def may_cut(self, step, fault):
        """Whether connections may be lost."""
        # CRIU that is killed while it works inside of the guest's processes
        # leaves sockets that give errors.
        return fault in (inject.MIGRATION['criu-a'], inject.SUSPEND['criu-a'])

    def _arm(self, plan):
        for host in (self.a, self.b):
            self.plan(host).write_text(plan)

    def _disarm(self):
        self._arm('')

    def _break(self, step, fault):
        """Wait for the step, and let it go wrong.

        :returns: whether there was something to break
        """
        base.wait_for(lambda: step in self.passed() or self.over(),
                      f'the step {step}', _REACHED)
        if step not in self.passed():
            # It has ended between the two looks, or never comes so far.
            raise AssertionError(f'the step {step} is not reached')
        self.fault = fault
        # What waits has taken it out of its plan.
        self._disarm()
        done = fault.inject(self)
        self.plan_go.touch()
        done = fault.after(self) or done
        if not fault.lasts and not fault.stays:
            self.fault = None
        return done

    def _supervise(self):
        """What an init system does with a service that has died, and a
        machine that has power again.
        """
        off = [h for h in (self.a, self.b) if not h.has_power()]
        if off:
            time.sleep(_BOOT)
            self._power_on(*off)
        dead = [h for h in (self.a, self.b) if h.process.poll() is not None]
        if dead:
            time.sleep(_SUPERVISOR)
        self.restarted = time.monotonic()
        for host in dead:
            host.start_agent(**self.agent_options)

    # A migration

    def boot(self):
        uuid = self.run_container(address=ADDRESS)
        self.sh(self.a, uuid, witness.START)
        self.witness = witness.Witness((self.a, self.b), uuid)
        self.start_database(uuid)
        self.stream = echo.Echo(ADDRESS, patience=after.SILENCE_S)
        base.wait_for(lambda: self.witness.last('a') and
                      self.stream.received, 'the guest to be busy')
        return uuid

    def _migration(self, mode, step, fault, plan):
        if step.startswith('layer.'):
            for layer in self.b.layer_list():
                self.b.layer_delete(layer['key'])
        uuid = self.boot()
        try:
            return self._moved(uuid, mode, step, fault, plan)
        finally:
            self.stop_watching()

    def stop_watching(self):
        self.witness.close()
        self.database.close()
        self.stream._stop.set()

    def _moved(self, uuid, mode, step, fault, plan):
        (self.top / 'points').unlink(missing_ok=True)
        self._arm(plan)
        migration = self.prepare_migration(
            uuid, self.a, self.b, **_OPTIONS[mode])
        watcher = threading.Thread(
            target=self._watch, args=(migration,), daemon=True)
        watcher.start()
        self.cut, self._cut_allowed = '', self.may_cut(step, fault)
        broken = self._break(step, fault)
        committed = 'source.committed' in self.passed()
        word = ''
        if fault.lasts:
            word = self._cut_off(uuid, migration) + ', then '
        self._supervise()
        self.ends = fault.ends
        verdict = self._verdict(uuid, migration, mode, committed, fault)
        self.fault_heal()
        watcher.join()
        if verdict in ('source', 'destination') and (
                self._starved(uuid, verdict)):
            verdict += _STARVED
        if verdict in (_LOST, *_ENDED.values()):
            self._check_lost(uuid)
        elif verdict.endswith(_STARVED):
            self._check_starved(uuid, verdict)
        else:
            self._check_runs(uuid, verdict)
        if not broken:
            raise one_host.Absent
        return word + verdict + self.cut

    def _watch(self, migration):
        """Notice the end of it, as far as the source says it."""
        while not self.over():
            try:
                if self.a.migration_status(migration, 1.0)['ended_at']:
                    break
            except errors.AgentUnavailable:
                break
            except errors.ContainerError:
                break
        self._finished.set()

    def _cut_off(self, uuid, migration):
        """The link does not heal: what holds until somebody mends it.

        :returns: what the guest does
        """
        deadline = time.monotonic() + _CUT_OFF
        while time.monotonic() < deadline and not self.over():
            status = self.a.migration_status(migration)
            if status['phase'] == 'committed' and status['error']:
                break
            self._at_most_one(uuid)
            time.sleep(0.5)
        running = self._at_most_one(uuid)
        if not kernel.alive((self.a, self.b), uuid):
            raise AssertionError('no copy is left while the link is cut')
        self.fault_heal()
        return {('a',): 'source', ('b',): 'destination'}.get(
            tuple(running), 'frozen')

    def _at_most_one(self, uuid):
        running = kernel.running((self.a, self.b), uuid)
        if len(running) > 1:
            raise AssertionError('the guest runs on both hosts')
        return running

    def _status(self, uuid, migration):
        """As the driver asks, see nova_pycontainer.migration."""
        try:
            return self.a.migration_status(migration, 1.0)
        except errors.ContainerError as e:
            if e.code != 'not_found':
                raise
        if self.a.info(uuid)['moved']:
            return {'phase': 'completed', 'error': None}
        return {'phase': 'failed', 'error': {
            'code': 'aborted', 'message': 'ended with the agent'}}

    def _verdict(self, uuid, migration, mode, committed, fault):
        """How it has ended, and what Nova does then.

        :returns: "source", "destination", _LOST or one of _ENDED
        """
        deadline = time.monotonic() + _END
        status = self._status(uuid, migration)
        while status['phase'] not in ('completed', 'aborted', 'failed'):
            self._at_most_one(uuid)
            if time.monotonic() > deadline:
                raise AssertionError(f'it never ends: {status}')
            status = self._status(uuid, migration)
        self.status = status
        if status['phase'] == 'completed':
            base.wait_for(
                lambda: self._runs_only('b', uuid) and
                self.witness.moves('b', 2.0) or self._gone(uuid) or
                self._starved(uuid, 'destination'),
                'the guest to run on the destination', 40)
            self.right(fault)
            # It runs, and may still be lost as long as pages are to come.
            base.wait_for(
                lambda: mode != 'post-copy' or self._has_all(migration) or
                self._gone(uuid), 'the end of post-copy', _END)
            if not self._gone(uuid):
                self.a.delete(uuid)
                return 'destination'
            if 'b' in self.ends:
                return _ENDED['b']
        elif (status['error'] or {}).get('code') != _LOST:
            base.wait_for(
                lambda: self._runs_only('a', uuid) or
                'a' in self.ends and self._gone(uuid) or
                self._starved(uuid, 'source'),
                'the guest to run on the source', 40)
            self.right(fault)
            gone = self._gone(uuid)
            self._roll_back(uuid, migration)
            return _ENDED['a'] if gone else 'source'
        if mode != 'post-copy' or not committed and (
                'source.committed' not in self.passed()):
            raise AssertionError(f'the guest is lost: {status}')
        self.right(fault)
        return _LOST

    def _has_all(self, migration):
        """Whether the destination waits for nothing more."""
        try:
            return self.b.migration_status(migration)['phase'] in (
                'completed', 'aborted', 'failed')
        except errors.ContainerError as e:
            return e.code == 'not_found'

    def _runs_only(self, name, uuid):
        running = self._at_most_one(uuid)
        return running == [name]

    def _gone(self, uuid):
        return not kernel.alive((self.a, self.b), uuid)

    def _starved(self, uuid, where):
        """Whether what shows that the guest runs was killed for lack of
        memory: on the source, where it goes on running and CRIU works in its
        processes, or on the destination of post-copy, where pages come.
        """
        host = {'source': self.a, 'destination': self.b}[where]
        return bool((self.killed or kernel.oom_kills(host, uuid)) and
                    kernel.Copy(host, uuid).inits and
                    not self.witness.is_alive(kernel.Copy(host, uuid)))

    def _roll_back(self, uuid, migration):
        """See nova_pycontainer.migration_destination."""
        try:
            status = self.b.migration_status(migration)
            if status['phase'] not in ('aborted', 'failed'):
                self.b.migration_abort(migration, 'rolled back')
                status = self.b.migration_status(migration)
            here = status['phase'] in ('committed', 'running', 'completed')
        except errors.ContainerError as e:
            if e.code != 'not_found':
                raise
            here = bool(kernel.alive((self.b,), uuid))
        if here:
            raise AssertionError(
                'the source has it, and the destination says so as well')
        self.b.delete(uuid)
