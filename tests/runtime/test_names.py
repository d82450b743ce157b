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

"""Names that a guest chooses, and that are no UTF-8; see proc(5)."""

import os
import signal
from unittest import mock

from nova_pycontainer.runtime import cgroup
from nova_pycontainer.runtime import container
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime.migration import guest
from nova_pycontainer.runtime.migration import patches
from nova_pycontainer.runtime import pausing
from nova_pycontainer.runtime import process
from nova_pycontainer.runtime import procfs
from nova_pycontainer.runtime import volumes
from tests.runtime import base
from tests.runtime import hosts

#: Its init becomes a program of such a name at the next start.
_INIT = r'''
init=/sbin/$(printf 'i\377')
cp /bin/busybox "$init"
rm /sbin/init
printf '#!/bin/sh\nexec -a init "%s"\n' "$init" > /sbin/init
chmod +x /sbin/init
sync
'''

#: A process that has such names wherever the kernel shows one. The second
#: program's is cut after 15 bytes, of which a Cyrillic letter has two; the
#: third one's looks like a line of proc_pid_status(5).
_NAMES = r'''
cat > /root/sleeper <<'.'
#!/bin/sh
exec 3>"$1"
cd "${1%/*}"
while :; do sleep 1000; done
.
chmod +x /root/sleeper
for name in 'i\377' 'программа' 'i\rNSpid:\t7'; do
    name=/root/$(printf "$name")
    cp /root/sleeper "$name"
    directory="$name.d"
    mkdir "$directory"
    case $name in *NSpid*) ;; *) mount -t tmpfs none "$directory";; esac
    echo kept > "$directory/file"
    NAME="$name" setsid "$name" "$directory/$(printf '\377')" \
        </dev/null >/dev/null 2>&1 &
done
for name in '\302\240 - x' '\342\200\250y'; do
    directory=/root/$(printf "$name")
    mkdir "$directory"
    mount -t tmpfs none "$directory"
done
# What does not move with CRIU has a name there as well.
directory=/root/$(printf 'ram\377')
mkdir "$directory"
mount -t ramfs none "$directory"
echo kept > "$directory/$(printf 'file\377')"
ln -s "$(printf 'target\377')" "$directory/link"
mkdir "/sys/fs/cgroup/$(printf 'group\377')"
until [ -e "/root/$(printf 'i\377.d/\377')" ] &&
        [ -e "/root/$(printf 'i\rNSpid:\t7.d/\377')" ] &&
        [ -e "/root/$(printf 'программа.d/\377')" ]; do
    sleep 0.05
done
'''

#: CRIU takes a carriage return for a space, and dumps no guest that has one in
#: a mount point.
_STRANGE = r'''
directory=/root/$(printf 'mount\r1 2 3')
mkdir "$directory"
mount -t tmpfs none "$directory"
'''

#: What the kernel calls the programs of it.
_COMMS = {b'i\xff', 'программа'.encode()[:15], b'i\rNSpid:\t7'}
_POINTS = {
    b'/root/i\xff.d', '/root/программа.d'.encode(), b'/root/mount\r1 2 3',
    '/root/\u00a0 - x'.encode(), '/root/\u2028y'.encode()}

_COUNT = r'''
set -- "/root/$(printf 'i\377.d')" "/root/программа.d" \
    "/root/$(printf 'i\rNSpid:\t7.d')"
cat "$1/file" "$2/file" "$3/file"
ls "$1" | wc -l
cd "/root/$(printf 'ram\377')"
cat "$(printf 'file\377')"
readlink link | od -c
ls -d "/sys/fs/cgroup/$(printf 'group\377')" | od -c
'''


def _comm(pid):
    with open(f'/proc/{pid}/comm', 'rb') as f:
        return f.read().removesuffix(b'\n')


def _is_init(pid):
    """Whether it is that program, and takes signals."""
    return _comm(pid) == b'i\xff' and process.heeds(pid, signal.SIGTERM)


class NamesTestCase(base.HostTestCase):

    def _with_init(self):
        uuid = self.run_container()
        self.wait_started(uuid)
        self.sh(uuid, _INIT)
        self.host.reboot(uuid, base.PATIENCE)
        self._wait_init(uuid)
        return uuid

    def _wait_init(self, uuid):
        base.wait_for(
            lambda: _is_init(self.host.info(uuid)['pid']), 'the program')

    def _restart(self):
        self.host.close()
        self.host = self.make_host()

    def test_init(self):
        uuid = self._with_init()
        other = self.run_container()
        self.assertEqual({uuid: 'running', other: 'running'}, {
            info['uuid']: info['state'] for info in self.host.list()})
        self._restart()
        self.assertEqual({uuid: 'running', other: 'running'}, {
            info['uuid']: info['state'] for info in self.host.list()})
        self.assertEqual('0', self.sh(uuid, 'id -u'))
        self.assertEqual('paused', self.host.pause(uuid)['state'])
        self._restart()
        self.assertEqual('paused', self.state(uuid))
        self.assertEqual('running', self.host.unpause(uuid)['state'])
        self.host.stop(uuid, base.PATIENCE)
        self.assertEqual('stopped', self.state(uuid))
        self.host.prepare(uuid)
        self.host.start_container(uuid)
        self._wait_init(uuid)
        self.host.kill(uuid)
        self.host.prepare(uuid)
        self.host.start_container(uuid)
        self._wait_init(uuid)
        self.host.delete(uuid)
        self.assertEqual([other], [i['uuid'] for i in self.host.list()])
        self.assertEqual([], self.traces(uuid))

    def test_reboot_by_the_guest(self):
        uuid = self._with_init()
        seen = self.host.events(-1, 0)[-1].seq
        self.sh_end(uuid, 'reboot')
        base.wait_for(
            lambda: 'rebooted' in [e.type for e in self.host.events(seen, 1)],
            'the reboot')
        self._wait_init(uuid)

    def test_processes_and_mounts(self):
        uuid = self.run_container()
        self.wait_started(uuid)
        self.sh(uuid, _NAMES + _STRANGE)
        item = self.host.entry(uuid).container
        found = {_comm(pid): pid for pid in item.cgroup.processes()}
        self.assertEqual(_COMMS, _COMMS & found.keys())
        for name in _COMMS:
            pid = found[name]
            with open(f'/proc/{pid}/status', 'rb') as f:
                inner = int(f.read().partition(b'\nNSpid:')[2].split()[1])
            self.assertEqual([pid, inner], process.numbers(pid))
            self.assertFalse(process.traced(f'/proc/{pid}'))
            self.assertFalse(process.uninterruptible(f'/proc/{pid}'))
            self.assertFalse(process.heeds(pid, 10))
            self.assertEqual(
                os.fsdecode(name), procfs.text(f'/proc/{pid}/comm').strip())
        points = {os.fsencode(m.point) for m in guest.mounts(item.live_pid())}
        self.assertEqual(_POINTS, _POINTS & points)
        self.assertEqual([], patches.pending(item.cgroup))
        process.kill_session(1 << 30, 'criu')
        self.assertIn('running', self.host.info(uuid)['state'])
        self.host.checks.source(uuid)
        self.assertEqual('paused', self.host.pause(uuid)['state'])
        self._restart()
        self.assertEqual('running', self.host.unpause(uuid)['state'])
        # All that is told of it can be written down.
        name = volumes._name(found[b'i\xff'])
        errors.ContainerError('in_use', f'({name})').message.encode()
        self.host.stop(uuid, base.PATIENCE)
        self.host.delete(uuid)
        self.assertEqual([], self.traces(uuid))


class UnforeseenTestCase(base.HostTestCase):
    """An error that nobody has thought of, with one container of two."""

    def _two(self):
        return self.run_container(), self.run_container()

    @staticmethod
    def _failing(method, uuid):
        def fail(self, *args, **kwargs):
            if self.uuid == uuid:
                raise ValueError('unforeseen')
            return method(self, *args, **kwargs)

        return fail

    def test_list_and_start(self):
        bad, good = self._two()
        with mock.patch.object(
                container.Container, 'open', autospec=True,
                side_effect=self._failing(container.Container.open, bad)):
            expected = {bad: 'unknown', good: 'running'}
            self.assertEqual(expected, {
                i['uuid']: i['state'] for i in self.host.list()})
            known = self.host.info(good)
            self.assertEqual(
                [known.keys()] * 2, [i.keys() for i in self.host.list()])
            self.host.close()
            self.host = self.make_host()
            self.assertEqual(expected, {
                i['uuid']: i['state'] for i in self.host.list()})
        self.assertEqual('running', self.state(bad))

    def test_pause_that_fails(self):
        uuid, _ = self._two()
        with mock.patch.object(
                pausing, 'in_vfork', autospec=True,
                side_effect=ValueError('unforeseen')):
            self.assertRaises(ValueError, self.host.pause, uuid)
        self.assertEqual('running', self.state(uuid))
        self.assertFalse(self.host.entry(uuid).container.cgroup.frozen())
        with mock.patch.object(
                container.Container, 'hold_network', autospec=True,
                side_effect=lambda item, on, **kw: on and 1 / 0):
            self.assertRaises(ZeroDivisionError, self.host.pause, uuid)
        self.assertEqual('running', self.state(uuid))


class HierarchiesTestCase(base.cases.TestCase):

    def test_mounts_of_others(self):
        with open('/proc/self/mountinfo', 'rb') as f:
            ours = os.fsdecode(f.read())
        strange = os.fsdecode(
            b'99999 1 0:99 / /mnt/\xff\xc2\xa0\\040x rw - tmpfs none rw\n')
        self.assertEqual(
            cgroup.Hierarchies(ours).v2, cgroup.Hierarchies(strange + ours).v2)


class MovedNamesTestCase(hosts.TwoHostsTestCase):

    def setUp(self):
        super().setUp()
        # As of a service that nobody has given a locale.
        for host in (self.a, self.b):
            host.env = {'LC_ALL': 'C'}
            host.restart_agent()

    def _made(self):
        uuid = self.run_container()
        base.wait_for(
            lambda: b'Start-up done' in self.a.console_log(uuid), 'its start')
        self.sh(self.a, uuid, _INIT)
        self.a.reboot(uuid, base.PATIENCE)
        base.wait_for(
            lambda: _is_init(self.a.info(uuid)['pid']), 'the program')
        self.sh(self.a, uuid, _NAMES)
        return uuid, self.sh(self.a, uuid, _COUNT)

    def _comms(self, host, uuid):
        group = cgroup.Cgroup(
            cgroup.Hierarchies(), f'{host.cgroup_parent}/{uuid}')
        return {_comm(pid) for pid in group.processes()}

    def test_suspend_and_resume(self):
        uuid, before = self._made()
        self.assertEqual('suspended', self.a.suspend(uuid)['state'])
        self.a.restart_agent()
        self.assertEqual('suspended', self.a.info(uuid)['state'])
        self.assertEqual('running', self.a.resume(uuid)['state'])
        self.assertEqual(before, self.sh(self.a, uuid, _COUNT))
        self.assertEqual(_COMMS, _COMMS & self._comms(self.a, uuid))
        self.a.kill_agent()
        self.a.start_agent()
        self.a.delete(uuid)
        self.assertEqual([], self.a.list())

    def test_live_migration(self):
        uuid, before = self._made()
        self.migrate(uuid, self.a, self.b)
        self.assertEqual(b'i\xff', _comm(self.b.info(uuid)['pid']))
        self.assertEqual(before, self.sh(self.b, uuid, _COUNT))
        self.assertEqual(_COMMS, _COMMS & self._comms(self.b, uuid))
        self.b.delete(uuid)
