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

"""The two-host cloud, on which one row after the other is tried."""

import contextlib
import os
import pathlib
import signal
import subprocess
import time

from openstack import exceptions

from tests.cloud import base
from tests.cloud import migration_base
from tests import echo
from tests.faults import database
from tests.faults import inject
from tests.faults import kernel
from tests.faults import witness

#: Between the death of a service and its next start.
_SUPERVISOR = 1.0
_BOOT = 3.0
_REACHED = 90.0
#: An RPC call that nobody answers any more takes 60 s to fail.
_SETTLED = 240.0
#: Longer than what a dead link is noticed in.
_CUT_OFF = 75.0
_ENDED = ('completed', 'failed', 'error', 'cancelled')
NOVA = ('host1.nova-compute', 'host2.nova-compute')
AGENTS = ('host1.agent', 'host2.agent')
#: Of the file system that a host has its instances on, which a fault fills.
_DISK_MIB = 4096
#: Where services are told, in turn, what is to go wrong in them.
_PLANS = base.CLOUD / 'faults'


class Absent(Exception):
    """There is nothing that this fault could break at this step."""


class KillServices(inject.Fault):

    def __init__(self, title, *names):
        super().__init__(title)
        self._services = names

    def inject(self, rig):
        for name in self._services:
            os.kill(rig.service_pid(name), signal.SIGKILL)
        return True


class KillsItself(inject.Fault):
    """Whoever passes the step dies of it."""

    action = 'kill'


class Host:
    """A host of the cloud, as the faults want it."""

    def __init__(self, name, host, rig):
        self.name, self._host, self._rig = name, host, rig
        self.cgroup_parent = f'pycontainer-{host}'

    @property
    def pid(self):
        return self._rig.service_pid(f'{self._host}.pause')

    def has_power(self):
        return (base.CLOUD / 'run/processes' /
                f'{self._host}.pause.json').exists()

    @property
    def instances(self):
        return pathlib.Path(
            f'/proc/{self.pid}/root/var/lib/pycontainer/instances')

    def kill_agent(self):
        os.kill(self._rig.service_pid(f'{self._host}.agent'), signal.SIGKILL)

    def run(self, *argv, check=True):
        try:
            return self._rig.on_host(self._host, *argv)
        except base.CommandError:
            if check:
                raise

    def power_off(self):
        base.cloud_sh('power-off', self._host)

    def power_on(self):
        base.cloud_sh('power-on', self._host)

    # A small disk for its instances

    @property
    def _image(self):
        return (base.CLOUD / 'data' / self._host /
                'pycontainer/instances.img')

    def small_disk(self):
        """Before its agent is started."""
        with open(self._image, 'wb') as f:
            f.truncate(_DISK_MIB << 20)
        subprocess.run(['mkfs.ext4', '-q', '-m', '0', self._image],
                       check=True, timeout=60)
        self.run('mount', '-o', 'loop',
                 '/var/lib/pycontainer/instances.img',
                 '/var/lib/pycontainer/instances')

    def usual_disk(self):
        """While its agent does not run."""
        self.run('umount', '/var/lib/pycontainer/instances')
        self._image.unlink()

    def traces(self, word):
        """What the kernel and the disk have of something."""
        found = [f'mount {line.split()[4]}' for line in pathlib.Path(
            f'/proc/{self.pid}/mountinfo').read_text().splitlines()
            if word in line]
        root = pathlib.Path(f'/proc/{self.pid}/root')
        for top in ('sys/fs/cgroup', 'run/cgroup1'):
            for path in (root / top).glob(
                    f'**/{self.cgroup_parent}/*{word}*'):
                found.append(f'control group {path}')
        for top in ('run/pycontainer', 'var/lib/pycontainer/instances',
                    'var/lib/nova'):
            for path in (root / top).rglob(f'*{word}*'):
                found.append(f'file {path}')
        return [f'host {self.name}: {text}' for text in found]


class Counting(migration_base.MigrationTestCase):
    """With servers that write down one number after the other."""

    #: What they do, and their flavor.
    script = witness.COUNT
    flavor_name = 'pyc.tiny'

    def counting(self, **kwargs):
        server = self.create_server(
            'busybox', self.flavor_name, host='host1', **kwargs)
        self.inside(server, self.script)
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
    """``self.try_row(verb, step, fault)`` tries one.

    The services run with files that say what is to go wrong in them, from
    :meth:`setUp` until the end of the test.
    """

    link = 'mig0'
    script = f'{witness.START} {database.START}'

    def setUp(self):
        super().setUp()
        self.a, self.b = Host('a', 'host1', self), Host('b', 'host2', self)
        self.go = _PLANS / 'go'
        _PLANS.mkdir(exist_ok=True)
        _PLANS.chmod(0o777)
        self.disarm()
        self.flavor_name = self.flavor('pyc.fault', 256, 1)
        self.open_port(7)
        self.addCleanup(self._normal)
        os.environ['PYCONTAINER_CLOUD_FAULTS'] = str(_PLANS)
        base.cloud_sh('stop', *NOVA, *AGENTS)
        for host in (self.a, self.b):
            host.small_disk()
        self._start()

    @staticmethod
    def image_file(name):
        """One with a database."""
        if name == 'busybox':
            return str(database.image())
        return Counting.image_file(name)

    def _start(self):
        base.cloud_sh('start', *AGENTS, *NOVA)
        for host in base.HOSTS:
            self.wait_compute(host)

    def _normal(self):
        del os.environ['PYCONTAINER_CLOUD_FAULTS']
        self._power_on()
        base.cloud_sh('stop', *NOVA, *AGENTS)
        for host in (self.a, self.b):
            host.usual_disk()
        self._start()

    def disarm(self):
        for name in (*NOVA, *AGENTS):
            for path in (_PLANS / name, _PLANS / f'{name}.points'):
                path.write_text('')
                path.chmod(0o666)

    def arm(self, services, plan):
        self.disarm()
        self.go.unlink(missing_ok=True)
        for name in services:
            (_PLANS / name).write_text(plan)

    # For the faults

    def passed(self):
        """The points that were passed."""
        return [step for name in (*AGENTS, *NOVA) for step in
                (_PLANS / f'{name}.points').read_text().split()]

    def over(self):
        """Whether what was begun has ended, as Nova says; looks now and
        then.
        """
        if not self._over and time.monotonic() > self._look:
            self._look = time.monotonic() + 1.0
            self._over = self._has_ended()
        return self._over

    def _has_ended(self):
        try:
            now = self.admin.compute.get_server(self._server.id)
        except exceptions.NotFoundException:
            return True
        return now.task_state is None

    def power_off(self, host):
        host.power_off()

    def _power_on(self):
        off = [h for h in (self.a, self.b) if not h.has_power()]
        if off:
            time.sleep(_BOOT)
        for host in off:
            host.power_on()

    # One row

    def try_row(self, verb, step, fault, agent):
        """:param fault: an :class:`inject.Fault`
        :param agent: whether it is a step of the agents
        :returns: what became of it, in a word
        :raises Absent: there was nothing to break
        """
        self._cut_allowed = bool(fault.ends) or fault is inject.MIGRATION[
            'criu-a']
        self.stream, self.cut = None, ''
        self._heal = lambda: fault.heal(self)
        self.witness = self._server = server = None
        if verb != 'spawn':
            server = (self._of_a_gone_image() if 'layer' in step.split('.')
                      else self.counting())
            self._server = server
            self.witness = witness.Witness((self.a, self.b), server.id)
            self.database = database.Database((self.a, self.b), server.id)
            self.addCleanup(self.witness.close)
            self.addCleanup(self.database.close)
            if verb == 'resume':
                self.demo.compute.suspend_server(server.id)
                self.wait_server(server.id, 'SUSPENDED')
            if verb == 'migrate':
                self.stream = echo.Echo(
                    self.floating_ip(server), patience=_SETTLED)
        self.arm(AGENTS if agent else NOVA, f'{step}=' + (
            f'wait:{self.go}' if fault.action == 'wait' else fault.action))
        server = self._server = getattr(self, f'_{verb}')(server)
        self._over, self._look = False, 0.0
        base.wait_for(lambda: step in self.passed(), _REACHED,
                      f'the step {step}', 0.1)
        word = ''
        try:
            broken = fault.inject(self)
            for name in (*NOVA, *AGENTS):
                (_PLANS / name).write_text('')
            self.go.touch()
            broken = fault.after(self) or broken
            if fault.lasts:
                word = self._cut_off(verb, server) + ', then '
                fault.heal(self)
            began = time.monotonic()
            self._supervise()
            outcome = getattr(self, f'_after_{verb}')(server)
            took = time.monotonic() - began
        finally:
            self.go.touch()
            fault.heal(self)
        self._check(server)
        if self.witness is not None:
            self.witness.close()
            self.database.close()
        if not broken:
            raise Absent
        return f'{word}{outcome}{self.cut} ({took:.0f} s)'

    def recover(self):
        """After a row that has broken, for the next one."""
        self._supervise()
        for host in base.HOSTS:
            self.wait_compute(host)
        server, self._server = self._server, None
        if server is not None and not self._gone(server):
            self.admin.compute.reset_server_state(server.id, 'error')
            self.delete_server(server.id)

    def _supervise(self):
        """What an init system does with a service that has died, and a
        machine that has power again.
        """
        self._power_on()
        time.sleep(_SUPERVISOR)
        # Those that are alive go on as they are.
        base.cloud_sh('start', *AGENTS, *NOVA)

    def _at_most_one(self, server):
        running = kernel.running((self.a, self.b), server.id)
        if len(running) > 1:
            raise AssertionError('the guest runs on both hosts')
        return running

    def _cut_off(self, verb, server):
        """The link does not heal: what holds until somebody mends it."""
        deadline = time.monotonic() + _CUT_OFF
        while time.monotonic() < deadline and not self.over():
            self._at_most_one(server)
            time.sleep(0.5)
        running = self._at_most_one(server)
        # A cold migration stops it; what is kept then are its files.
        if (verb != 'resize' and server.status == 'ACTIVE' and
                not self.copies(server)):
            raise AssertionError('no copy is left while the link is cut')
        return {('a',): 'source', ('b',): 'destination'}.get(
            tuple(running), 'frozen')

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
        return self.create_server('busybox', self.flavor_name, host='host1',
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
        def ended():
            try:
                now = self.admin.compute.get_server(server.id)
            except exceptions.NotFoundException:
                return 'deleted'
            # Then its user deletes it once more.
            failed = now.status == 'ERROR' and now.task_state is None
            return 'error' if failed else None

        return base.wait_for(ended, _SETTLED, 'its end')

    def _after_migrate(self, server):
        base.wait_for(
            lambda: self.migrations(server)[0].status in _ENDED, _SETTLED,
            'the end of the migration')
        now = self._settled(server, 'ACTIVE')
        self._wait_running(server)
        self.assert_at(server, now.compute_host)
        return {'host1': 'source', 'host2': 'destination'}[now.compute_host]

    def _wait_running(self, server):
        """A host that has booted starts it when its nova-compute does."""
        base.wait_for(lambda: self.containers(self.host_of(server)).get(
            server.id, {}).get('state') == 'running', _SETTLED, 'it runs')

    def _after_suspend(self, server):
        return self._settled(server, 'ACTIVE', 'SUSPENDED').status.lower()

    _after_resume = _after_suspend

    def _after_resize(self, server):
        now = self._settled(server, 'ACTIVE', 'VERIFY_RESIZE', 'ERROR')
        # Nothing is reverted to or started on a disk that is still full.
        self._heal()
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
        ports = [*self.admin.network.ports(device_id=server.id)]
        if not self._gone(server):
            now = self.admin.compute.get_server(server.id)
            if now.status == 'SUSPENDED':
                self.demo.compute.resume_server(server.id)
                now = self.wait_server(server.id, 'ACTIVE')
            if now.status == 'ACTIVE':
                self._check_runs(server)
            self.delete_server(server.id)
        for host in base.HOSTS:
            self.wait_gone_from(host, server, _SETTLED)
        left = self.copies(server)
        if left:
            raise AssertionError(f'deleted, and it runs: {left}')
        for host, name in ((self.a, 'host1'), (self.b, 'host2')):
            self.assertEqual([], host.traces(server.id))
            for port in ports:
                self.assertNotIn(f'tap{port.id[:11]}',
                                 self.switch_ports(name))
        self.assertEqual({}, self.allocations(server))
        self.assertEqual(
            [], [*self.admin.network.ports(device_id=server.id)])

    def _check_stream(self):
        """It is the same connection, and has lost nothing."""
        if self.stream is None:
            return
        received = self.stream.received
        if not self._cut_allowed:
            base.wait_for(lambda: self.stream.error or
                          self.stream.received > received + 20,
                          60, 'the stream goes on')
        if self.stream.error and not self._cut_allowed:
            raise AssertionError(f'the stream broke: {self.stream.error!r}')
        if self.stream.error:
            self.cut = ', connections cut'

    def _check_runs(self, server):
        self._wait_running(server)
        self.assertEqual(1, len(self.copies(server)))
        self._check_stream()
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
        if self.witness is not None:
            name = {'host1': 'a', 'host2': 'b'}[now.compute_host]
            self.assertEqual([], self.witness.problems(name))
            self.assertEqual([], self.database.problems(
                name, lambda command: self.inside(server, command)))
        self._check_stream()
        if self.stream is not None and not self._cut_allowed:
            self.stream.finish()
        elif self.stream is not None:
            with contextlib.suppress(AssertionError):
                self.stream.finish()
