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

"""What keeps a guest from moving, said before anything is frozen.
"""

import ctypes
import os
import subprocess
import sys
import threading

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime.migration import compatibility
from tests.runtime import base
from tests.runtime import hosts

#: Runs with the host's own Python in the namespaces of a guest, but without
#: its seccomp filter, and ends as a child of the guest's init.
INTRUDER = '''
import ctypes, os, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
cgroup, pid, what = sys.argv[1:]
kept = []
if what == "device":
    kept.append(os.open("/dev/fuse", os.O_RDWR))
elif what == "io_uring":
    kept.append(libc.syscall(425, 4, ctypes.create_string_buffer(120)))
elif what == "bpf":
    attributes = (ctypes.c_uint32 * 32)(2, 4, 4, 1)
    kept.append(libc.syscall(321, 0, attributes, ctypes.sizeof(attributes)))
elif what == "userfaultfd":
    kept.append(libc.syscall(323, 0))
elif what == "vsock":
    kept.append(socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM))
elif what == "mptcp":
    kept.append(socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262))
assert kept and all(fd != -1 for fd in kept), ctypes.get_errno()
open(cgroup, "w").write("0")
libc.setns(os.pidfd_open(int(pid)), 0x20000000 | 0x40000000 | 0x4000000 |
           0x8000000 | 0x20000 | 0x2000000 | 0x10000000 | 0x80)
if os.fork():
    os._exit(0)
os.setsid()
if os.fork():
    os._exit(0)
print("ready", flush=True)
os.close(1)
libc.pause()
'''


class CheckTestCase(hosts.TwoHostsTestCase):

    def check(self, uuid):
        return self.a.migration_check_source(uuid)

    def problems(self, uuid):
        return {p['name']: p for p in self.check(uuid)['problems']}

    def only(self, uuid, name):
        """The one problem; its process and remedy are said."""
        found = self.problems(uuid)
        self.assertEqual([name], [*found], found)
        self.assertTrue(found[name]['remedy'])
        print(found[name])
        return found[name]

    def background(self, uuid, script):
        self.sh(self.a, uuid, f'setsid sh -c {script!r} '
                '</dev/null >/dev/null 2>&1 &')

    def intrude(self, uuid, what):
        info = self.a.info(uuid)
        with open(f'/proc/{info["pid"]}/cgroup') as f:
            path = next(line.split(':', 2)[2].strip() for line in f
                        if line.startswith('0:'))
        done = subprocess.run(
            [sys.executable, '-c', INTRUDER,
             f'/sys/fs/cgroup{path}/cgroup.procs', str(info['pid']), what],
            stdout=subprocess.PIPE, text=True, timeout=30)
        self.assertEqual('ready\n', done.stdout)

    # What can move

    def test_nothing_wrong(self):
        uuid = self.run_container()
        found = self.check(uuid)
        self.assertEqual([], found['problems'])
        facts = found['facts']
        self.assertGreater(facts['processes'], 0)
        self.assertGreater(facts['memory_bytes'], 0)
        there = self.b.migration_check_destination(facts)
        self.assertEqual([], there['problems'])
        self.assertTrue(there['facts']['layer_present'])

    def test_systemd(self):
        self.dhcp()
        uuid = self.run_container('debian13', memory=512, nics=[{
            'id': '0123456789d-x', 'devname': 'tap0123456789d',
            'mac': 'fa:16:3e:00:00:35', 'mtu': 1500, 'tx_offload': True}])
        base.wait_for(
            lambda: self.sh(self.a, uuid, 'systemctl is-system-running || :')
            in ('running', 'degraded'), 'systemd', 240)
        self.assertEqual([], self.check(uuid)['problems'])
        # Paused as well.
        self.a.pause(uuid)
        self.assertEqual([], self.check(uuid)['problems'])

    def test_not_running(self):
        uuid = self.run_container()
        self.a.kill(uuid)
        error = self.assertRaises(
            errors.ContainerError, self.check, uuid)
        self.assertEqual('bad_state', error.code)

    def test_processes_that_come_and_go(self):
        uuid = self.run_container()
        self.background(
            uuid, 'while :; do for n in 1 2 3 4; do /bin/busybox dd '
            'if=/dev/zero of=/dev/null count=1 & done; wait; done')
        for _ in range(200):
            self.assertEqual([], self.check(uuid)['problems'])

    # What cannot

    def test_nested_namespaces(self):
        uuid = self.run_container(nesting=True)
        self.background(uuid, 'exec unshare -u sleep 1000')
        # Which unshare makes, before it becomes sleep.
        base.wait_for(lambda: 'sleep' in str(self.problems(uuid)),
                      'the namespace')
        problem = self.only(uuid, 'nested-uts-namespace')
        self.assertIn('sleep', problem['process'])
        self.assertIn('nesting', problem['remedy'])
        # It is true.
        migration = self.prepare_migration(uuid, self.a, self.b)
        status = base.wait_for(
            lambda: self._ended(self.a, migration), 'the end')
        self.assertIn('uts', status['error']['cause'])
        self.assertEqual('running', self.a.info(uuid)['state'])

    def test_nested_mounts_can_move(self):
        uuid = self.run_container(nesting=True)
        self.background(uuid, 'exec unshare -m sleep 1000')
        base.wait_for(lambda: self.sh(
            self.a, uuid, 'ps | grep "[s]leep 1000" || :'), 'the namespace')
        self.assertEqual({}, self.problems(uuid))

    def test_exec_session(self):
        uuid = self.run_container()
        thread = threading.Thread(target=self.a.exec, args=(
            uuid, ['/bin/sh', '-c', 'while ! [ -e /root/end ]; do sleep 1; '
                   'done']))
        thread.start()
        self.addCleanup(thread.join, base.PATIENCE)
        # Who enters becomes the shell only then.
        base.wait_for(lambda: 'sh (pid' in str(self.problems(uuid)),
                      'the session')
        problem = self.only(uuid, 'outside-parent')
        self.assertIn('sh (pid', problem['process'])
        self.sh(self.a, uuid, 'touch /root/end')
        thread.join()
        self.assertEqual({}, self.problems(uuid))

    def test_descriptors(self):
        for what, name, text in (
            ('io_uring', 'io_uring', 'io_uring'),
            ('bpf', 'bpf', 'BPF'),
            ('device', 'device', '/dev/fuse (10:229)'),
            ('userfaultfd', 'userfaultfd', 'userfaultfd'),
            ('vsock', 'socket-family', 'AF_VSOCK'),
        ):
            uuid = self.run_container()
            self.intrude(uuid, what)
            problem = self.only(uuid, name)
            self.assertIn(text, problem['reason'])
            self.assertIn('python', problem['process'])
            self.a.delete(uuid)

    def test_mount(self):
        uuid = self.run_container()
        pid = str(self.a.info(uuid)['pid'])
        subprocess.run(
            ['nsenter', '-t', pid, '-m', 'mount', '-t', 'hugetlbfs', 'x',
             '/mnt'], check=True, timeout=30)
        problem = self.only(uuid, 'mount')
        self.assertIn('/mnt is a hugetlbfs', problem['reason'])

    def python(self, script):
        uuid = self.run_container('debian13', memory=512, init={
            'argv': ['/usr/bin/python3', '-c', script]})
        base.wait_for(lambda: self.problems(uuid), 'the problem')
        return uuid

    def test_multipath_tcp(self):
        uuid = self.run_container()
        self.intrude(uuid, 'mptcp')
        problem = self.only(uuid, 'socket-protocol')
        self.assertIn('Multipath TCP', problem['reason'])
        self.assertIn('GODEBUG', problem['remedy'])

    def test_no_multipath_tcp_in_a_guest(self):
        """Else every server in Go would keep its guest from moving."""
        uuid = self.run_container('debian13', memory=512, init={
            'argv': ['/usr/bin/python3', '-c', 'import signal\n'
                     'signal.pause()']})
        for family in ('AF_INET', 'AF_INET6'):
            self.assertEqual('93', self.sh(
                self.a, uuid, 'python3 -c "import socket\ntry:\n '
                f'socket.socket(socket.{family}, 1, 262)\n'
                'except OSError as e: print(e.errno)"'))

    def test_deleted_file(self):
        problem = self.only(self.python(
            'import os, signal\n'
            'f = open("/root/big", "wb")\n'
            'f.write(os.urandom(66 << 20))\n'
            'f.flush()\n'
            'os.unlink("/root/big")\n'
            'signal.pause()'), 'deleted-file')
        self.assertIn('/root/big', problem['reason'])

    def test_traced(self):
        uuid = self.python(
            'import ctypes, os, signal\n'
            'if os.fork() == 0:\n'
            '    ctypes.CDLL(None).ptrace(0, 0, 0, 0)\n'
            '    os.kill(os.getpid(), signal.SIGSTOP)\n'
            'signal.pause()')
        self.assertIn('strace', self.only(uuid, 'traced')['remedy'])

    # The other host

    def test_destination(self):
        uuid = self.run_container()
        facts = self.check(uuid)['facts']

        def names(**changes):
            found = self.b.migration_check_destination({**facts, **changes})
            for problem in found['problems'] + found['warnings']:
                print(problem)
                self.assertTrue(problem['remedy'])
            return [p['name'] for p in found['problems']]

        cpu = facts['cpu']
        self.assertEqual(['cpu-features'], names(cpu={
            **cpu, 'flags': [*cpu['flags'], 'avx1024']}))
        self.assertEqual([], names(cpu={
            **cpu, 'flags': cpu['flags'][:-1]}))
        self.assertEqual(['cpu-state'], names(cpu={
            **cpu, 'signal_frame': cpu['signal_frame'] + 64}))
        self.assertEqual(['architecture'], names(cpu={
            **cpu, 'architecture': 's390x'}))
        self.assertEqual(['criu-version'], names(criu='99.1'))
        self.assertEqual(['cgroup-mode'], names(cgroup='other'))
        self.assertEqual(['disk'], names(disk_bytes=1 << 60))
        self.assertEqual(['memory'], names(memory_bytes=1 << 60))
        self.assertEqual([], names(kernel='99.1'))
        self.assertIn('kernel-version', [
            w['name'] for w in self.b.migration_check_destination(
                {**facts, 'kernel': '99.1'})['warnings']])
        self.assertFalse(self.b.migration_check_destination(
            {**facts, 'layer': 'sha256-' + 'f' * 64})[
                'facts']['layer_present'])
        # The range of ids belongs to another, or the guest is here.
        other = self.run_container(host=self.b)
        self.assertEqual(['id-range'], names(
            base_id=self.b.info(other)['base_id']))
        self.assertEqual(['exists'], names(uuid=other))
        # Others have what nobody else may.
        self.assertEqual(['id-range'], names(
            base_id=0x40000000 + 8192 * 65536))
        self.assertEqual(['protocol'], names(format=2))
        self.assertEqual(['protocol'], names(protocol=None))
        few = {key: facts[key] for key in ('format', 'protocol')}
        error = self.assertRaises(
            errors.ContainerError, self.b.migration_check_destination, few)
        self.assertEqual('invalid', error.code)

    def test_what_a_cpu_has(self):
        cpu = compatibility.cpu()
        self.assertEqual(os.uname().machine, cpu['architecture'])
        self.assertTrue(cpu['flags'])
        self.assertGreater(cpu['signal_frame'], 0)
        self.assertEqual(
            ctypes.CDLL(None).getauxval(51), cpu['signal_frame'])
