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

"""Snapshots: archives of what guests see, whatever the guests do meanwhile."""

import contextlib
import io
import os
import signal
import struct
import subprocess
import tarfile
import threading
import uuid as uuidlib

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import faults
from nova_pycontainer.runtime.migration import versions
from tests.runtime import base
from tests.runtime import test_agent

#: CAP_NET_RAW, effective; version 2 names no root, version 3 does.
RAW = 1 << 13
TWO = struct.pack('<5I', 0x02000001, RAW, 0, 0, 0)
CAPABILITY = 'security.capability'
#: user::rw- user:1234:r-- group::r-- mask::r-- other::---
ACL = (1, 6, 0xffffffff), (2, 4, 1234), (4, 4, 0xffffffff), (
    16, 4, 0xffffffff), (32, 0, 0xffffffff)
CHANGES = """
mkdir -p /data/deep
echo changed > /data/file; chown 1000:1001 /data/file; chmod 4750 /data/file
ln /data/file /data/deep/link
ln -s /etc/passwd /data/symlink
mkfifo /data/fifo
truncate -s 64M /data/sparse
echo end >> /data/sparse
echo ü > "/data/größe and so on"
echo new > /etc/hostname
rm /etc/os-release
rm -r /usr/share/doc; mkdir -p /usr/share/doc; echo only > /usr/share/doc/new
echo gone > /run/volatile; echo gone > /dev/shm/volatile || true
touch -d "2001-02-03 04:05:06" /data/deep
"""


class Archive:
    """A snapshot that was read to its end."""

    def __init__(self, data):
        self.data = data
        self._tar = tarfile.open(fileobj=io.BytesIO(data))
        self.members = {
            os.path.normpath(m.name): m for m in self._tar.getmembers()}

    def read(self, name):
        return self._tar.extractfile(self.members[name]).read()

    def attribute(self, name, key):
        text = self.members[name].pax_headers.get(key)
        return text and text.encode('utf-8', 'surrogateescape')


class Helpers:

    def changed_container(self, **kwargs):
        uuid = self.run_container(**kwargs)
        self.wait_started(uuid)
        self.sh(uuid, CHANGES)
        info = self.host.info(uuid)
        root = f'/proc/{info["pid"]}/root'
        first = info['base_id']
        os.setxattr(f'{root}/data/file', 'user.note', b'\0\xff')
        os.setxattr(f'{root}/data/sparse', CAPABILITY, struct.pack(
            '<6I', 0x03000001, RAW, 0, 0, 0, first))
        os.setxattr(
            f'{root}/etc/hostname', 'system.posix_acl_access',
            struct.pack('<I', 2) + b''.join(
                struct.pack('<HHI', tag, bits, ident if
                            ident == 0xffffffff else first + ident)
                for tag, bits, ident in ACL))
        return uuid

    def assert_changes(self, archive):
        members = archive.members
        file = members['data/file']
        names = {'data/file', 'data/deep/link'}
        if file.islnk():
            file = members['data/deep/link']
        other, = names - {os.path.normpath(file.name)}
        self.assertEqual((1000, 1001, 0o4750), (
            file.uid, file.gid, file.mode & 0o7777))
        self.assertEqual(os.path.normpath(file.name), os.path.normpath(
            members[other].linkname))
        self.assertEqual(b'changed\n', archive.read(
            os.path.normpath(file.name)))
        self.assertEqual(b'\0\xff', archive.attribute(
            os.path.normpath(file.name), 'SCHILY.xattr.user.note'))
        self.assertTrue(members['data/fifo'].isfifo())
        self.assertEqual('/etc/passwd', members['data/symlink'].linkname)
        sparse = members['data/sparse']
        self.assertEqual((64 << 20) + 4, sparse.size)
        self.assertEqual(b'\0\0end\n', archive.read('data/sparse')[-6:])
        self.assertEqual(TWO, archive.attribute(
            'data/sparse', f'SCHILY.xattr.{CAPABILITY}'))
        self.assertIn(b'user:1234:r--', archive.attribute(
            'etc/hostname', 'SCHILY.acl.access'))
        self.assertEqual(b'new\n', archive.read('etc/hostname'))
        self.assertEqual('ü\n'.encode(), archive.read(
            'data/größe and so on'))
        self.assertEqual(0, members['bin/busybox'].uid)
        self.assertEqual((0, 0, 0o1777), (
            members['tmp'].uid, members['tmp'].gid,
            members['tmp'].mode & 0o7777))
        self.assertEqual(
            {'usr/share/doc', 'usr/share/doc/new'},
            {name for name in members if name.startswith('usr/share/doc')})
        self.assertNotIn('etc/os-release', members)
        self.assertEqual([], [
            name for name, m in members.items()
            if m.ischr() or m.isblk() or 'volatile' in name or
            name.startswith(('proc/', 'sys/', 'dev/'))])
        # The holes stay holes.
        self.assertLess(len(archive.data), 32 << 20)

    def left(self):
        place = self.config.state_dir / 'snapshots'
        with open('/proc/self/mounts') as f:
            return [*place.iterdir(), *(
                line for line in f if str(place) in line)]


class SnapshotTestCase(Helpers, base.HostTestCase):

    def take(self, uuid, **kwargs):
        with self.host.snapshots.take(uuid, **kwargs) as pieces:
            return Archive(b''.join(pieces))

    def plan(self, point, action):
        faults._plan[point] = action
        self.addCleanup(faults._plan.pop, point, None)

    def gate(self, point):
        """Let snapshots wait at a point, until the function is called."""
        go = self.config.run_dir / 'go'
        self.plan(point, f'wait:{go}')
        return go.touch

    def joined(self, thread):
        """Start a thread that may wait at a gate, whoever opens it.

        A test that fails before it has done so does at its end.
        """
        thread.start()
        self.addCleanup(thread.join, base.PATIENCE)
        self.addCleanup((self.config.run_dir / 'go').touch)
        return thread

    def begin(self, uuid):
        """Take a snapshot in another thread; returns how to get it."""
        result = []

        def work():
            try:
                result.append(self.take(uuid))
            except errors.ContainerError as e:
                result.append(e)

        thread = self.joined(threading.Thread(target=work))

        def end():
            thread.join(base.PATIENCE)
            self.assertFalse(thread.is_alive())
            return result[0]

        return end

    def waiting(self, point):
        base.wait_for(lambda: point not in faults._plan, point)

    def noticed(self, uuid):
        """Until the snapshot knows that it is given up."""
        base.wait_for(lambda: self.host.snapshots._of(
            uuid)._reason is not None, 'the notice')

    def test_of_a_running_container(self):
        uuid = self.changed_container()
        pid = self.host.info(uuid)['pid']
        archive = self.take(uuid)
        self.assert_changes(archive)
        info = self.host.info(uuid)
        self.assertEqual(('running', pid), (info['state'], info['pid']))
        self.assertEqual([], self.left())
        # The same files make the same archive.
        self.assertEqual(archive.data, self.take(uuid).data)

    def test_of_a_stopped_container(self):
        uuid = self.changed_container()
        self.host.stop(uuid, 30)
        self.assert_changes(self.take(uuid))
        self.assertEqual('stopped', self.state(uuid))
        self.assertEqual([], self.left())
        self.assertEqual([], [
            t for t in self.traces(uuid) if ' - ' in t])
        self.host.prepare(uuid)
        self.host.start_container(uuid)
        self.assertEqual('changed', self.sh(uuid, 'cat /data/file'))

    def test_of_one_that_has_never_run(self):
        uuid = str(uuidlib.uuid4())
        self.host.define(uuid, self.spec())
        self.assertIn('bin/busybox', self.take(uuid).members)
        self.assertEqual('defined', self.state(uuid))

    def test_of_a_paused_container(self):
        uuid = self.changed_container()
        self.host.pause(uuid)
        self.assert_changes(self.take(uuid))
        self.assertEqual('paused', self.state(uuid))
        self.host.unpause(uuid)
        self.assertEqual('changed', self.sh(uuid, 'cat /data/file'))

    def test_of_a_suspended_container(self):
        uuid = self.changed_container()
        self.sh(uuid, 'setsid sh -c "sleep 1000; echo done" '
                '</dev/null >/dev/null 2>&1 & '
                'until pidof sleep >/dev/null; do :; done')
        self.host.checkpoints.suspend(uuid)
        with self.host.snapshots.take(uuid) as pieces:
            first = next(pieces)
            self.assert_code('bad_state', self.host.checkpoints.resume, uuid)
            # It would throw the memory away.
            self.assert_code('bad_state', self.host.prepare, uuid)
            self.assert_changes(Archive(first + b''.join(pieces)))
        self.assertEqual('suspended', self.state(uuid))
        self.host.checkpoints.resume(uuid)
        self.assertEqual('changed', self.sh(
            uuid, 'pidof sleep >/dev/null && cat /data/file'))

    def test_a_container_of_it_is_the_same(self):
        uuid = self.changed_container()
        archive = self.take(uuid)
        key = 'test-' + uuid.replace('-', '')
        self.addCleanup(self.host.layer_delete, key)
        self.addCleanup(self._delete_all)
        self.host.layer_import(key, io.BytesIO(archive.data), image='x')
        second = self.run_container_of(key)
        self.assertEqual(
            '1000 1001 4750 2', self.sh(
                second, 'stat -c "%u %g %a %h" /data/file'))
        self.assertEqual('new', self.sh(second, 'cat /etc/hostname'))
        self.assertEqual('', self.sh(
            second, 'ls /etc/os-release || true'))
        info = self.host.info(second)
        root = f'/proc/{info["pid"]}/root'
        self.assertEqual(
            (0x03000001, RAW, info['base_id']), struct.unpack(
                '<II12xI', os.getxattr(f'{root}/data/sparse', CAPABILITY)))
        # And a snapshot of that one is the same again, but for the time of
        # directories that its start has touched.
        again = self.take(second)
        self.assert_changes(again)
        self.assertEqual({*archive.members}, {*again.members})

    def run_container_of(self, key):
        uuid = str(uuidlib.uuid4())
        self.host.define(uuid, {**self.spec(), 'layer': key})
        self.host.prepare(uuid)
        self.host.start_container(uuid)
        return uuid

    def test_names_that_only_the_index_knows(self):
        """Two names of a file in the layer, written through one of them."""
        _, path = base.layer_key('busybox')
        made = self.config.state_dir.parent / 'image.tar'
        tree = self.config.state_dir.parent / 'tree'
        tree.mkdir()
        self.addCleanup(subprocess.run, ['rm', '-rf', tree], check=True)
        subprocess.run(['tar', '-xpf', path, '-C', tree], check=True,
                       timeout=60)
        (tree / 'one').write_text('old\n')
        os.link(tree / 'one', tree / 'two')
        subprocess.run(['tar', '-cf', made, '-C', tree, '.'], check=True,
                       timeout=60)
        key = 'test-' + uuidlib.uuid4().hex
        self.addCleanup(self.host.layer_delete, key)
        self.addCleanup(self._delete_all)
        with open(made, 'rb') as f:
            self.host.layer_import(key, f, image='x')
        uuid = self.run_container_of(key)
        self.sh(uuid, 'sleep 0.1; echo new > /two')
        for _ in ('running', 'stopped'):
            archive = self.take(uuid)
            one, two = archive.members['one'], archive.members['two']
            self.assertEqual(b'new\n', archive.read(
                'two' if one.islnk() else 'one'))
            self.assertEqual([False, True], sorted(
                (one.islnk(), two.islnk())))
            self.host.stop(uuid, 30)

    def test_it_is_of_one_moment(self):
        """A guest counts in two files, one after the other."""
        uuid = self.run_container()
        self.sh(uuid, 'setsid sh -c "i=0; while :; do i=\\$((i+1)); '
                'echo \\$i > /a; echo \\$i > /b; done" '
                '</dev/null >/dev/null 2>&1 &')
        base.wait_for(lambda: self.sh(uuid, 'cat /b', check=False), 'counts')
        for _ in range(3):
            archive = self.take(uuid)
            a, b = (archive.read(name).decode().strip() for name in 'ab')
            # A file that is just being written may be empty.
            if a and b:
                self.assertIn(int(a) - int(b), (0, 1))

    def test_start_waits_for_its_end(self):
        uuid = self.run_container()
        self.host.stop(uuid, 30)
        with self.host.snapshots.take(uuid) as pieces:
            next(pieces)
            self.assert_code('bad_state', self.host.prepare, uuid)
            self.assert_code(
                'bad_state', contextlib.ExitStack().enter_context,
                self.host.snapshots.take(uuid))
        # One that nobody reads to its end leaves nothing either.
        self.assertEqual([], self.left())
        self.host.prepare(uuid)

    def test_stop_in_the_middle(self):
        uuid = self.changed_container()
        go = self.gate('snapshot.pass')
        end = self.begin(uuid)
        self.waiting('snapshot.pass')
        pid = self.host.info(uuid)['pid']
        stop = self.joined(
            threading.Thread(target=self.host.stop, args=(uuid, 30)))
        base.wait_for(
            lambda: not os.path.exists(f'/proc/{pid}/root/etc'), 'the end')
        go()
        self.assert_changes(end())
        stop.join()
        self.assertEqual('stopped', self.state(uuid))

    def test_reboot_by_the_guest_in_the_middle(self):
        uuid = self.changed_container()
        go = self.gate('snapshot.pass')
        end = self.begin(uuid)
        self.waiting('snapshot.pass')
        seen = self.host.events(-1, 0)[-1].seq
        self.sh_end(uuid, 'reboot')
        go()
        self.assert_changes(end())
        self.assertEqual(
            'rebooted', self.host.events(seen, base.PATIENCE)[0].type)
        self.assertEqual('running', self.state(uuid))

    def test_nothing_else_moves_it_meanwhile(self):
        uuid = self.run_container()
        go = self.gate('snapshot.pass')
        end = self.begin(uuid)
        self.waiting('snapshot.pass')
        self.assert_code('bad_state', self.host.checkpoints.suspend, uuid)
        self.assert_code(
            'bad_state', self.host.migrations.begin, uuid,
            str(uuidlib.uuid4()), versions.own())
        go()
        self.assertIn('bin/busybox', end().members)

    def test_deletion_in_the_middle(self):
        uuid = self.run_container()
        go = self.gate('snapshot.pass')
        end = self.begin(uuid)
        self.waiting('snapshot.pass')
        delete = self.joined(
            threading.Thread(target=self.host.delete, args=(uuid,)))
        self.noticed(uuid)
        go()
        error = end()
        self.assertEqual('aborted', error.code, error)
        delete.join(base.PATIENCE)
        self.assertEqual([], self.traces(uuid))
        self.assertEqual([], self.left())

    def test_reader_that_goes_away(self):
        uuid = self.run_container()
        gone = []
        go = self.gate('snapshot.pass')

        def take():
            return self.assert_code(
                'aborted', self.take, uuid, gone=lambda: bool(gone))

        thread = self.joined(threading.Thread(target=take))
        self.waiting('snapshot.pass')
        gone.append(True)
        self.noticed(uuid)
        go()
        thread.join(base.PATIENCE)
        self.assertEqual([], self.left())

    def test_failure_while_it_stands_still(self):
        uuid = self.run_container()
        self.plan('snapshot.frozen', 'raise')
        self.assertRaises(OSError, self.take, uuid)
        self.assertEqual('running', self.state(uuid))
        self.assertEqual([], self.left())
        self.assertIn('bin/busybox', self.take(uuid).members)

    def test_without_room(self):
        uuid = self.run_container()
        place = self.config.state_dir / 'snapshots'
        subprocess.run(
            ['mount', '-t', 'tmpfs', '-o', 'size=16m', 'tmpfs', place],
            check=True, timeout=30)
        self.addCleanup(
            subprocess.run, ['umount', place], check=True, timeout=30)
        error = self.assert_code('no_space', self.take, uuid)
        self.assertIn('16 MiB are free', error.message)
        self.assertEqual(uuid, error.uuid)
        # What is down is not copied.
        self.host.stop(uuid, 30)
        self.assertIn('bin/busybox', self.take(uuid).members)


class LoopTestCase(SnapshotTestCase):
    """Where the upper is a file system of its own."""

    disk_limit = 'loop'


class AgentTestCase(Helpers, test_agent.AgentTestCase):
    """Over the socket, and over deaths of the agent."""

    def test_stream(self):
        uuid = self.changed_container()
        with self.host.snapshot(uuid) as stream:
            data = b''.join(iter(lambda: stream.read(100_000), b''))
        self.assert_changes(Archive(data))
        self.assert_code(
            'not_found', self.host.snapshot, str(uuidlib.uuid4()))
        with self.host.snapshot(uuid) as stream:
            stream.read(10)
        base.wait_for(lambda: not self.left(), 'the end')

    def test_agent_dies_while_the_guest_stands_still(self):
        uuid = self.run_container()
        pid = self.host.info(uuid)['pid']
        self.stop_agent()
        os.environ['PYCONTAINER_FAULTS'] = 'snapshot.frozen=kill'
        try:
            self.start_agent()
        finally:
            del os.environ['PYCONTAINER_FAULTS']
        self.assertRaises(
            errors.AgentUnavailable, self.host.snapshot, uuid)
        self.assertEqual(-signal.SIGKILL, self.process.wait(base.PATIENCE))
        self.assertNotEqual([], self.left())
        self.start_agent()
        info = self.host.info(uuid)
        self.assertEqual(('running', pid), (info['state'], info['pid']))
        self.assertEqual([], self.left())
        with self.host.snapshot(uuid) as stream:
            self.assertEqual(100, len(stream.read(100)))

    def test_agent_dies_in_the_middle_of_the_stream(self):
        uuid = self.run_container()
        # More than the pipes and sockets in between hold.
        self.sh(uuid, 'dd if=/dev/urandom of=/big bs=1M count=32')
        stream = self.host.snapshot(uuid)
        self.addCleanup(stream.close)
        stream.read(10)
        self.kill_agent()
        self.assert_code('aborted', stream.read)
        self.start_agent()
        self.assertEqual([], self.left())
