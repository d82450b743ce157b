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

"""Suspend and resume: the memory of a container on its disk."""

import contextlib
import json
import os
import signal
import sys
import time

from nova_pycontainer.runtime import errors
from tests import echo
from tests.runtime import base
from tests.runtime import hosts

#: Counts in its memory, and writes what it has counted. It has a file open
#: that has no name any more.
_COUNTER = '''
echo $$ > /root/pid
exec 3>/root/unlinked; rm /root/unlinked
n=0
while :; do n=$((n + 1)); echo $n > /root/count; echo $n >&3; sleep 0.05; done
'''


#: Tells what a disk has of a checkpoint, in the host's namespaces. The disk of
#: a suspended container is mounted by nobody.
_LOOK = '''
import errno, json, os, pathlib, sys
from nova_pycontainer.runtime import disk
instance = pathlib.Path(sys.argv[1])
state = json.loads((instance / "state.json").read_text())
owner = state["base_id"]
of = disk.Disk(instance, json.loads(sys.argv[2]), owner,
               state["spec"]["resources"]["disk_bytes"])
of.mount()

def mode(status):
    return status.st_mode & 0o7777, status.st_uid, status.st_gid

def refused(uid, call):
    pid = os.fork()
    if pid == 0:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        try:
            call()
        except OSError as e:
            os._exit(e.errno)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return errno.errorcode.get(code)

try:
    place = of.directory / "checkpoint"
    files = {str(path.relative_to(place)): path.lstat()
             for path in place.rglob("*") if not path.is_dir()}
    pages = max(files, key=lambda name: files[name].st_size)
    print(json.dumps({
        "directory": mode(place.stat()), "device": place.stat().st_dev,
        "upper_device": of.upper.stat().st_dev, "used": of.usage()[0],
        "files": {name: (*mode(status), status.st_blocks * 512)
                  for name, status in files.items()},
        "refused": {user: {
            "directory": refused(uid, lambda: os.listdir(place)),
            "file": refused(uid, lambda: open(place / pages).close())}
            for user, uid in (("nobody", 65534), ("guest", owner))}}))
finally:
    of.unmount()
'''


class CheckpointTestCase(hosts.TwoHostsTestCase):

    def _counting(self, *args, **kwargs):
        uuid = self.run_container(*args, **kwargs)
        self.sh(self.a, uuid,
                f"cat > /root/counter <<'.'\n{_COUNTER}.\n"
                'setsid sh /root/counter </dev/null >/dev/null 2>&1 &')
        base.wait_for(lambda: self._count(uuid, '/root/count'),
                      'the first number')
        return uuid, self._pid(uuid)

    def _count(self, uuid, name):
        return int(self.sh(self.a, uuid, f'cat {name} || echo 0') or 0)

    def _pid(self, uuid):
        """Of the counter; nothing if it does not run."""
        return self.sh(
            self.a, uuid, 'pid=$(cat /root/pid); if grep -q /root/[c]ounter '
            '/proc/$pid/cmdline; then echo $pid; fi')

    def _directory(self, uuid):
        return self.a.directory / 'state/instances' / uuid

    def _goes_on(self, uuid, pid, before):
        self.assertEqual('running', self.a.info(uuid)['state'])
        self.assertEqual(pid, self._pid(uuid))
        base.wait_for(lambda: self._count(uuid, '/root/count') > before,
                      'the counter')
        self.assertFalse(self._checkpoint(uuid))

    def _checkpoint(self, uuid):
        """Whether there is one, while the disk is mounted."""
        path = self._directory(uuid) / 'disk/checkpoint'
        return self.a.run('test', '-e', str(path),
                          check=False).returncode == 0

    def _processes(self, uuid):
        parent = f'/sys/fs/cgroup/{self.a.cgroup_parent}/{uuid}'
        return os.path.exists(parent)

    def assert_code(self, code, function, *args):
        error = self.assertRaises(errors.ContainerError, function, *args)
        self.assertEqual(code, error.code, str(error))
        return error

    def test_again_and_again(self):
        uuid, pid = self._counting(address='203.0.113.10')
        uptime = 'cut -d" " -f1 /proc/uptime'
        for _ in range(3):
            before = self._count(uuid, '/root/count')
            up = float(self.sh(self.a, uuid, uptime))
            self.assertEqual('suspended', self.a.suspend(uuid)['state'])
            self.assertFalse(self._processes(uuid))
            self.assertIsNone(self.a.info(uuid)['pid'])
            self.assertEqual(0, self.a.info(uuid)['memory_bytes'])
            time.sleep(0.5)
            self.assertEqual('suspended', self.a.info(uuid)['state'])
            self.assertEqual('running', self.a.resume(uuid)['state'])
            self._goes_on(uuid, pid, before)
            self.assertGreater(float(self.sh(self.a, uuid, uptime)), up)
            self.attach(self.a, uuid)
            base.ping('203.0.113.10')
        unlinked = f'/proc/{pid}/fd/3'
        self.assertIn('(deleted)', self.sh(
            self.a, uuid, f'readlink {unlinked}'))
        self.assertEqual(
            '1', self.sh(self.a, uuid, f'head -n 1 {unlinked}'))
        self.assertEqual([], [
            line for line in self.sh(
                self.a, uuid, 'ls -A /root').splitlines()
            if line not in ('count', 'counter', 'pid')])

    def test_connections(self):
        """Nothing resets them while it goes; their peers send on."""
        uuid = self.run_container(address='203.0.113.10')
        self.sh(self.a, uuid,
                'setsid nc -ll -p 7 -e /bin/cat </dev/null >/dev/null 2>&1 &')
        streams = [echo.Echo('203.0.113.10') for _ in range(20)]
        for _ in range(6):
            time.sleep(0.2)
            self.a.suspend(uuid)
            self.a.resume(uuid)
            self.attach(self.a, uuid)
            received = [stream.received for stream in streams]
            base.wait_for(lambda before=received: all(
                stream.error or stream.received > count
                for stream, count in zip(streams, before)),
                'the connections to go on')
        for stream in streams:
            stream.finish()

    def test_systemd(self):
        uuid = self.run_container('debian13', memory=512, init={
            'argv': ['/sbin/init', 'cloud-init=disabled']})
        running = 'systemctl is-system-running || :'
        base.wait_for(lambda: self.sh(self.a, uuid, running) in (
            'running', 'degraded'), 'systemd')
        # Without cloud-init nobody makes keys for it.
        self.sh(self.a, uuid, 'ssh-keygen -A; systemctl reset-failed; '
                'systemctl restart ssh')
        base.wait_for(lambda: self.sh(self.a, uuid, running) == 'running',
                      'all of its services')
        self.sh(self.a, uuid,
                'systemd-run --on-active=3 --timer-property=AccuracySec=1ms '
                'touch /root/fired')
        self.a.suspend(uuid)
        self.a.resume(uuid)
        self.assertEqual('running', self.sh(self.a, uuid, running), self.sh(
            self.a, uuid, 'systemctl --failed; journalctl -b -n 60'))
        base.wait_for(lambda: self.sh(
            self.a, uuid, 'ls /root/fired || :'), 'the timer')
        self.sh(self.a, uuid, 'systemctl restart systemd-journald')

    def test_of_what_does_not_run(self):
        uuid = self.run_container()
        self.assert_code('bad_state', self.a.resume, uuid)
        self.a.pause(uuid)
        self.assert_code('bad_state', self.a.suspend, uuid)
        self.a.unpause(uuid)
        self.a.suspend(uuid)
        self.assert_code('bad_state', self.a.suspend, uuid)
        self.assert_code('bad_state', self.a.exec, uuid, ['true'])
        self.assert_code('bad_state', self.a.pause, uuid)
        self.assertIn(b'', self.a.console_log(uuid))

    def test_discarded(self):
        """By what starts it afresh, and by what turns it off."""
        uuid, _ = self._counting()
        self.a.suspend(uuid)
        self.a.kill(uuid)
        self.assertEqual('stopped', self.a.info(uuid)['state'])
        self.assert_code('bad_state', self.a.resume, uuid)
        self.a.prepare(uuid)
        self.a.start_container(uuid)
        self.assertFalse(self._checkpoint(uuid))
        self.a.suspend(uuid)
        self.a.reboot(uuid, 0)
        self.assertEqual('running', self.a.info(uuid)['state'])
        self.assertFalse(self._checkpoint(uuid))
        # Files are kept by all of it, programs by none. (The count may just
        # have been cut, to be written.)
        self.assertTrue(self.sh(self.a, uuid, 'cat /root/pid'))
        self.assertEqual('', self._pid(uuid))

    def test_deleted(self):
        uuid, _ = self._counting(address='203.0.113.10')
        self.a.suspend(uuid)
        self.a.delete(uuid)
        self.assertEqual([], self.a.list())
        self.assertFalse(self._directory(uuid).exists())

    def test_disk_too_small(self):
        uuid, pid = self._counting()
        self.sh(self.a, uuid,
                'mkdir /memory; mount -t tmpfs -o size=128m x /memory; '
                'head -c 100000000 /dev/urandom > /memory/data; '
                'dd if=/dev/zero of=/root/full bs=1M || :')
        error = self.assert_code('no_space', self.a.suspend, uuid)
        self.assertIn('does not fit on its disk', str(error))
        self.sh(self.a, uuid, 'rm /root/full')
        self._goes_on(uuid, pid, 0)
        before = self.sh(self.a, uuid, 'md5sum < /memory/data')
        self.a.suspend(uuid)
        self.a.resume(uuid)
        self.assertEqual(
            before, self.sh(self.a, uuid, 'md5sum < /memory/data'))

    def test_nobody_else_reads_it(self):
        """All that the guest had in its memory is in there: it is root's, on
        the instance's own disk, and a part of what that may hold.
        """
        uuid, _ = self._counting()
        self.sh(self.a, uuid,
                'mkdir /memory; mount -t tmpfs -o size=80m x /memory; '
                'head -c 64m /dev/urandom > /memory/data; sync')
        before = self.a.info(uuid)['disk']['used_bytes']
        self.a.suspend(uuid)
        done = self.a.run(
            sys.executable, '-c', _LOOK, str(self._directory(uuid)),
            json.dumps(self.a.info(uuid)['disk']['method']))
        found = json.loads(done.stdout)
        print(found)
        self.assertEqual([0o700, 0, 0], found['directory'])
        self.assertGreater(len(found['files']), 20)
        for name, (mode, uid, gid, _) in found['files'].items():
            self.assertEqual((0, 0), (uid, gid), name)
            self.assertEqual(0, mode & 0o7022, name)
        size = sum(size for *_, size in found['files'].values())
        self.assertGreater(size, 64 << 20)
        # As large as it is on the disk that its limit is of.
        self.assertEqual(found['upper_device'], found['device'])
        self.assertGreater(found['used'] - before, size - (8 << 20))
        # Neither does another user of the host, nor the guest's root.
        for user, refusals in found['refused'].items():
            self.assertEqual(
                {'directory': 'EACCES', 'file': 'EACCES'}, refusals, user)
        self.a.resume(uuid)
        self.assertLess(
            self.a.info(uuid)['disk']['used_bytes'], before + (8 << 20))

    def test_restore_that_fails(self):
        """The checkpoint is as good as before."""
        uuid, pid = self._counting()
        self.a.suspend(uuid)
        for point in 'resume.restored', 'resume.adopted':
            self.a.restart_agent(faults=f'{point}=raise')
            self.assertRaises(errors.ContainerError, self.a.resume, uuid)
            self.assertEqual('suspended', self.a.info(uuid)['state'])
            self.assertFalse(self._processes(uuid))
        self.a.resume(uuid)
        self._goes_on(uuid, pid, 0)

    def _killed_at(self, point, uuid, verb):
        self.a.restart_agent(faults=f'{point}=kill')
        self.assertRaises(errors.AgentUnavailable, verb, uuid)
        self.assertEqual(
            -signal.SIGKILL, self.a.process.wait(base.PATIENCE))
        self.a.restart_agent()

    def test_agent_killed_while_it_suspends(self):
        uuid, pid = self._counting()
        for point in 'suspend.frozen', 'suspend.dumped':
            self._killed_at(point, uuid, self.a.suspend)
            base.wait_for(
                lambda: self.a.info(uuid)['state'] == 'running', point)
            self._goes_on(uuid, pid, self._count(uuid, '/root/count'))
        self._killed_at('suspend.saved', uuid, self.a.suspend)
        self.assertEqual('suspended', self.a.info(uuid)['state'])
        self.assertFalse(self._processes(uuid))
        self.a.resume(uuid)
        self._goes_on(uuid, pid, 0)

    def test_agent_killed_while_it_resumes(self):
        uuid, pid = self._counting()
        for point in 'resume.restored', 'resume.adopted':
            before = self._count(uuid, '/root/count')
            self.a.suspend(uuid)
            self._killed_at(point, uuid, self.a.resume)
            self.assertEqual('suspended', self.a.info(uuid)['state'])
            self.assertFalse(self._processes(uuid))
            self.a.resume(uuid)
            self._goes_on(uuid, pid, before)

    def test_host_boots(self):
        """Nothing is left but the disk."""
        uuid, pid = self._counting(address='203.0.113.10')
        before = self._count(uuid, '/root/count')
        self.a.suspend(uuid)
        self.a.stop_agent()
        for process in self.a.pids():
            # The agent's helpers end by themselves.
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        base.wait_for(lambda: not self.a.pids(), 'the end of all processes')
        self.a.run('rm', '-r', '/run/pyc')
        self.a.start_agent()
        self.assertEqual('suspended', self.a.info(uuid)['state'])
        self.a.resume(uuid)
        self._goes_on(uuid, pid, before)
