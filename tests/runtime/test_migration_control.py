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

"""Abort in each phase, and force-complete.

The agent stops at a point of a migration until a file appears, so that each
abort comes at a known moment.
"""

import os
import pathlib
import subprocess
import threading

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import netlink
from nova_pycontainer.runtime import unix_sockets
from tests import cases
from tests.runtime import base
from tests.runtime import test_migration_faults as faults

#: Where an abort comes in time: all of the source's points before its commit,
#: and the destination's, which has to be heard of its answer.
IN_TIME = (
    *(('a', point) for point in faults.SOURCE_BEFORE),
    *(('b', point) for point in faults.DESTINATION_BEFORE))
TOO_LATE = tuple(('a', point) for point in faults.SOURCE_AFTER)


_UNREAD = '''
import os, socket, struct, time
netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
# All links: struct nlmsghdr, struct rtgenmsg.
netlink.send(struct.pack("=IHHII4x", 20, 18, 0x301, 1, 0))
open("/run/asked", "w").close()
while not os.path.exists("/read"):
    time.sleep(0.02)
netlink.settimeout(0.5)
try:
    while netlink.recv(65536):
        pass
except TimeoutError:
    pass
open("/run/answered", "w").close()
time.sleep(100000)
'''

_HOLDS = '''
import errno, os, socket, time
netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
netlink.bind((0, 1))  # RTMGRP_LINK
room = netlink.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
open("/run/holds", "w").close()
while not os.path.exists("/read"):
    time.sleep(0.02)
netlink.setblocking(False)
found = []
while True:
    try:
        found.append("told of a link" if netlink.recv(65536) else "")
    except BlockingIOError:
        break
    except OSError as e:
        found.append(errno.errorcode[e.errno])
if netlink.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) != room:
    found.append("another size")
with open("/run/found.new", "w") as f:
    f.write(", ".join(sorted(set(found))))
os.rename("/run/found.new", "/run/found")
time.sleep(100000)
'''

_READS = '''
import socket, struct, time
netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
netlink.bind((0, 1))  # RTMGRP_LINK
netlink.setblocking(False)
open("/run/reads", "w").close()
while True:
    netlink.send(struct.pack("=IHHII4x", 20, 18, 0x301, 1, 0))
    time.sleep(0.05)
    try:
        while netlink.recv(65536):
            pass
    except BlockingIOError:
        pass
    time.sleep(0.005)
'''
_SENDS = '''
import socket, time
ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
theirs.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
open("/run/sends", "w").close()
while True:
    ours.send(b"READY=1")
    time.sleep(0.1)
    theirs.recv(100)
    time.sleep(0.05)
'''
_FORKS = """
import subprocess
count = 0
while True:
    subprocess.run(['/bin/true'])
    count += 1
    with open('/run/forks', 'w') as f:
        print(count, file=f)
"""


class ControlTestCase(faults.Helpers):

    def wait_at(self, name, point):
        """A migration that waits at a point.

        :returns: the instance, the migration, and the file that lets it go on
        """
        host = getattr(self, name)
        go, host.record = self.top / f'go-{point}', self.top / 'points'
        host.record.unlink(missing_ok=True)
        host.restart_agent(f'{point}=wait:{go}')
        uuid = self._boot()
        host.record.unlink(missing_ok=True)
        migration = self.prepare_migration(uuid, self.a, self.b)
        base.wait_for(
            lambda: host.record.exists() and
            point in host.record.read_text().split(), point)
        return uuid, migration, go

    def abort(self, uuid, migration, go):
        """Abort from another thread, for what is aborted waits here."""
        failure = []

        def run():
            try:
                self.a.migration_abort(migration, 'changed my mind')
            except errors.ContainerError as e:
                failure.append(e)

        thread = threading.Thread(target=run)
        thread.start()
        # Before the agent knows of it, nothing may go on.
        said = f'{uuid}: the migration is aborted'
        base.wait_for(lambda: not thread.is_alive() or
                      said in self.a.log.read_text(), 'the abort')
        go.touch()
        thread.join(base.PATIENCE)
        return failure[0] if failure else None

    def test_abort_in_time(self):
        for name, point in cases.some(IN_TIME, 1, 5, 9):
            uuid, migration, go = self.wait_at(name, point)
            before = self.a.info(uuid)
            self.assertIsNone(self.abort(uuid, migration, go), point)
            status = self.a.migration_status(migration)
            self.assertEqual('aborted', status['phase'], point)
            self.assertEqual('aborted', status['error']['code'], point)
            self.assertIn('changed my mind', str(status['error']), point)
            # It is as if nothing had happened.
            self._settled(uuid, ['a'])
            after = self.a.info(uuid)
            for same in ('pid', 'base_id', 'spec', 'started_at'):
                self.assertEqual(before[same], after[same], point)
            self.assertIsNone(after['migration'])
            journal = (self.a.directory / 'state/instances' / uuid /
                       'journal.json')
            self.assertFalse(journal.exists(), point)
            self._check_clean(self.b, uuid)
            base.wait_for(lambda: not self.b.list(), 'the clean-up')
            # The network answers, and the next try succeeds.
            base.ping('203.0.113.10')
            self.migrate(uuid, self.a, self.b)
            self._settled(uuid, ['b'])
            base.ping('203.0.113.10')
            self.b.delete(uuid)

    def test_dump_is_tried_again(self):
        """A guest with an unread netlink message cannot be dumped, until it
        has read it.
        """
        self._tried_again()

    def test_dump_with_pages_to_follow_is_tried_again(self):
        self._tried_again(strategy='post-copy', permit_post_copy=True)

    def _tried_again(self, **options):
        uuid = self.run_container('debian13', memory=256, init={
            'argv': ['/usr/bin/python3', '-c', _UNREAD]})
        base.wait_for(lambda: self.sh(
            self.a, uuid, 'ls /run/asked || :'), 'the question')
        migration = self.prepare_migration(uuid, self.a, self.b, **options)
        base.wait_for(lambda: 'the dump is tried again' in
                      self.a.log.read_text(), 'the first try')
        # A command would be one more process that a dump finds.
        root = f'/proc/{self.a.info(uuid)["pid"]}/root'
        os.close(os.open(f'{root}/read', os.O_CREAT | os.O_WRONLY))
        self.finish_migration(uuid, migration, self.a, self.b)
        self.assertEqual('running', self.b.info(uuid)['state'])
        base.wait_for(lambda: self.sh(
            self.b, uuid, 'ls /run/answered || :'), 'the answer')

    def _holds(self):
        """A guest that was told of its link, and does not read that.

        As systemd holds the socket of a service that waits for another.
        """
        uuid = self.run_container(
            'debian13', memory=256, address='203.0.113.10',
            init={'argv': ['/usr/bin/python3', '-c', _HOLDS]})
        base.wait_for(lambda: self.sh(
            self.a, uuid, 'ls /run/holds || :'), 'the socket')
        [nic] = self.a.info(uuid)['spec']['nics']
        for state in ('down', 'up'):
            self.a.run('ip', 'link', 'set', nic['devname'], state)
        pid = self.a.info(uuid)['pid']
        base.wait_for(lambda: netlink.unread(pid), 'an unread message')
        return uuid

    def _finds(self, host, uuid):
        """What it reads in the end."""
        root = f'/proc/{host.info(uuid)["pid"]}/root'
        os.close(os.open(f'{root}/read', os.O_CREAT | os.O_WRONLY))
        return base.wait_for(lambda: self.sh(
            host, uuid, 'cat /run/found 2>/dev/null || :'),
            'what it has read').strip()

    def test_unread_messages(self):
        """Nobody can carry the kernel's messages to another host: there the
        guest is told that it has missed some.
        """
        uuid = self._holds()
        self.migrate(uuid, self.a, self.b)
        self.assertEqual(
            'ENOBUFS, told of a link', self._finds(self.b, uuid))

    def test_unread_messages_and_an_abort(self):
        uuid = self._holds()
        self.a.restart_agent('source.dumped=raise')
        migration = self.prepare_migration(uuid, self.a, self.b)
        ended = base.wait_for(
            lambda: self._ended(self.a, migration), 'the end')
        self.assertEqual('failed', ended['phase'])
        self.assertEqual(
            'ENOBUFS, told of a link', self._finds(self.a, uuid))

    def test_unread_messages_and_a_dead_agent(self):
        uuid = self._holds()
        self.a.restart_agent('source.dumped=kill')
        migration = self.prepare_migration(uuid, self.a, self.b)
        self.a.process.wait(base.PATIENCE)
        self.a.restart_agent()
        base.wait_for(lambda: self._ended(self.b, migration), 'the end')
        self.assertEqual('running', self.a.info(uuid)['state'])
        self.assertEqual(
            'ENOBUFS, told of a link', self._finds(self.a, uuid))

    def test_unread_messages_and_a_suspend(self):
        uuid = self._holds()
        self.a.suspend(uuid)
        self.a.resume(uuid)
        self.assertEqual(
            'ENOBUFS, told of a link', self._finds(self.a, uuid))

    def test_paused_is_silent(self):
        """A paused machine answers nobody, on either host."""
        address = '203.0.113.10'
        uuid = self.run_container(address=address)
        base.ping(address)
        self.a.pause(uuid)
        self._assert_silent(address)
        self.a.unpause(uuid)
        base.ping(address)
        self.a.pause(uuid)
        self.migrate(uuid, self.a, self.b)
        self._assert_silent(address)
        # A migration that fails leaves it as it was.
        self.a.restart_agent('destination.prepared=raise')
        migration = self.prepare_migration(uuid, self.b, self.a)
        base.wait_for(lambda: self._ended(self.b, migration), 'the end')
        self.assertEqual('paused', self.b.info(uuid)['state'])
        self._assert_silent(address)
        self.b.unpause(uuid)
        base.ping(address)
        self.b.pause(uuid)
        self.b.kill(uuid)
        self.b.prepare(uuid)
        self.attach(self.b, uuid)
        self.b.start_container(uuid)
        self.sh(self.b, uuid, base.NO_DHCP +
                f'ip address add {address}/24 dev eth0; ip link set eth0 up')
        base.ping(address)

    def _assert_silent(self, address):
        self.assertEqual(1, subprocess.run(
            ['ping', '-c', '3', '-i', '0.2', '-W', '1', address],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            timeout=30).returncode)

    def test_paused_while_it_reads(self):
        """A guest that is always about to read can be moved when paused."""
        uuid = self.run_container(
            'debian13', memory=256, address='203.0.113.10',
            init={'argv': ['/usr/bin/python3', '-c', _READS]})
        base.wait_for(lambda: self.sh(
            self.a, uuid, 'ls /run/reads || :'), 'the first message')
        pid = self.a.info(uuid)['pid']
        base.wait_for(lambda: netlink.unread(pid), 'an unread message')
        for _ in range(5):
            self.a.pause(uuid)
            self.assertEqual('paused', self.a.info(uuid)['state'])
            self.assertFalse(netlink.unread(pid))
            self.a.unpause(uuid)
        self.a.pause(uuid)
        # What happens to its link it is told while it is paused.
        [nic] = self.a.info(uuid)['spec']['nics']
        for state in ('down', 'up'):
            self.a.run('ip', 'link', 'set', nic['devname'], state)
        base.wait_for(lambda: netlink.unread(pid), 'an unread message')
        self.migrate(uuid, self.a, self.b)
        self.assertEqual('paused', self.b.info(uuid)['state'])

    def test_paused_with_a_message(self):
        """Nor can CRIU dump who has sent a message that nobody has read."""
        uuid = self.run_container('debian13', memory=256, init={
            'argv': ['/usr/bin/python3', '-c', _SENDS]})
        base.wait_for(lambda: self.sh(
            self.a, uuid, 'ls /run/sends || :'), 'the first message')
        source, destination = self.a, self.b
        for _ in range(3):
            while True:
                source.pause(uuid)
                if unix_sockets.unread(source.info(uuid)['pid']):
                    break
                source.unpause(uuid)
            self.migrate(uuid, source, destination)
            source, destination = destination, source
            self.assertEqual('paused', source.info(uuid)['state'])

    def test_paused_while_it_forks(self):
        """Nothing can trace a process that waits for its child in vfork(2).
        """
        uuid = self.run_container('debian13', memory=256, init={
            'argv': ['/usr/bin/python3', '-c', _FORKS]})
        base.wait_for(lambda: self.sh(
            self.a, uuid, 'ls /run/forks || :'), 'the first child')
        pid = self.a.info(uuid)['pid']
        for _ in range(50):
            self.a.pause(uuid)
            # The kernel calls one frozen that is about to be.
            base.wait_for(lambda: ') S ' in pathlib.Path(
                f'/proc/{pid}/stat').read_text(), 'a process to trace', 5)
            self.a.unpause(uuid)
        self.a.pause(uuid)
        self.migrate(uuid, self.a, self.b)
        self.assertEqual('paused', self.b.info(uuid)['state'])
        self.b.unpause(uuid)
        count = self.sh(self.b, uuid, 'cat /run/forks')
        base.wait_for(lambda: self.sh(
            self.b, uuid, 'cat /run/forks') != count, 'the next child')

    def test_abort_too_late(self):
        for name, point in TOO_LATE:
            uuid, migration, go = self.wait_at(name, point)
            error = self.abort(uuid, migration, go)
            self.assertIsNotNone(error, point)
            self.assertEqual('bad_state', error.code, point)
            status = base.wait_for(
                lambda m=migration: self._ended(self.a, m), 'the end')
            self.assertEqual('completed', status['phase'], point)
            self._settled(uuid, ['b'])
            self.assertEqual('stopped', self.a.info(uuid)['state'])
            self.a.delete(uuid)
            self.b.delete(uuid)

    def test_abort_does_not_wait_for_a_pass(self):
        """Which may take hours."""
        uuid = self._boot()
        self.sh(self.a, uuid, 'dd if=/dev/urandom of=/big bs=1M count=100')
        migration = self.prepare_migration(
            uuid, self.a, self.b, bandwidth=1 << 20)
        base.wait_for(
            lambda: self.b.migration_status(migration)['phase'] == 'copying',
            'the first pass')
        self.a.migration_abort(migration, 'changed my mind')
        self.assertEqual(
            'aborted', self.a.migration_status(migration)['phase'])
        self.assertEqual(0, self.a.migration_status(migration)['passes'])
        self._settled(uuid, ['a'])
        self._check_clean(self.b, uuid)

    # Force-complete

    def endless(self):
        """A guest that writes faster than its files can be copied."""
        uuid = self._boot()
        self.sh(self.a, uuid, 'setsid sh -c "while :; do '
                'for n in 1 2 3 4 5 6; do dd if=/dev/urandom of=/endless\\$n '
                'bs=1M count=4 conv=notrunc; done; done" '
                '</dev/null >/dev/null 2>&1 &')
        return uuid

    def begin_endless(self, uuid, **options):
        migration = self.prepare_migration(
            uuid, self.a, self.b, bandwidth=16 << 20, max_passes=100000,
            **options)
        base.wait_for(
            lambda: self.a.migration_status(migration)['passes'] > 2,
            'some passes')
        status = self.a.migration_status(migration)
        self.assertEqual('copying', status['phase'])
        self.assertEqual('stop-and-copy', status['strategy'])
        return migration

    def test_force_complete(self):
        uuid = self.endless()
        migration = self.begin_endless(uuid)
        self.a.migration_force_complete(migration)
        there, _here = self.finish_migration(uuid, migration, self.a, self.b)
        self.assertEqual('stop-and-copy', there['strategy'])
        self._settled(uuid, ['b'])

    def test_force_complete_into_post_copy(self):
        uuid = self.endless()
        migration = self.begin_endless(uuid, permit_post_copy=True)
        self.a.migration_force_complete(migration)
        there, here = self.finish_migration(uuid, migration, self.a, self.b)
        self.assertEqual('post-copy', there['strategy'])
        self.assertEqual('completed', here['phase'])
        self._settled(uuid, ['b'])
        # It writes on.
        path = str(self.b.directory / 'state/instances' / uuid /
                   'disk/upper/endless1')
        sums = {self.b.run('md5sum', path).stdout for _ in range(5)}
        base.wait_for(
            lambda: sums.add(self.b.run('md5sum', path).stdout) or
            len(sums) > 2, 'the guest to write')
