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

"""Limits hold, and a guest that goes mad hurts only itself."""

import contextlib
import os
import pathlib
import signal
import subprocess
import time

from testtools import matchers

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import revert
from tests.runtime import base


class LimitsTestCase(base.HostTestCase):

    def _cpu_seconds(self, uuid):
        return self.host.info(uuid)['cpu_time_ns'] / 1e9

    def test_memory_hog_dies_alone(self):
        victim = self.run_container()
        hog = self.run_container(memory=64 * base.MIB)
        # tail keeps the one endless line in memory.
        done = self.host.exec(
            hog, ['/bin/sh', '-c', 'tail /dev/zero'], timeout_s=base.PATIENCE)
        self.assertIn(done.exit_code, (137, -signal.SIGKILL))
        self.assertGreater(self.host.info(hog)['oom_kills'], 0)
        self.assertLessEqual(
            self.host.info(hog)['memory_bytes'], 64 * base.MIB)
        for uuid in (victim, hog):
            self.assertEqual('0', self.sh(uuid, 'id -u'))
        self.assertEqual(0, self.host.info(victim)['oom_kills'])

    def test_swap(self):
        """Beside its memory; none where nothing is said of it."""
        for swap in (0, 32 * base.MIB):
            uuid = self.run_container(resources={
                **self.spec(memory=64 * base.MIB)['resources'],
                **({'swap_bytes': swap} if swap else {})})
            group = pathlib.Path(self.config.cgroup_parent, uuid)
            # v2 limits the swap, v1 both.
            alone = '/sys/fs/cgroup' / group / 'memory.swap.max'
            both = ('/run/cgroup1/memory' / group /
                    'memory.memsw.limit_in_bytes')
            if alone.exists():
                self.assertEqual(swap, int(alone.read_text()))
            elif both.exists():
                self.assertEqual(
                    64 * base.MIB + swap, int(both.read_text()))
            else:
                self.skipTest('this kernel has no limit on swap')

    def test_memory_of_init_itself_tells_oom(self):
        uuid = self.run_container(memory=32 * base.MIB, init={'argv': [
            '/bin/busybox', 'tail', '/dev/zero']})
        self.wait_state(uuid, 'stopped')
        ended = self.host.info(uuid)['exit']
        self.assertEqual((signal.SIGKILL, True),
                         (ended['signal'], ended['oom']))

    def test_fork_bomb_stays_within_its_pids(self):
        victim = self.run_container()
        bomb = self.run_container(pids=64)
        # It goes off when those have ended who would leave room in the end:
        # the start-up script, and the command that lays it.
        self.wait_started(bomb)
        self.sh(bomb, '{ until [ -e /root/go ]; do sleep 0.05; done; '
                '(while :; do sleep 1000 & done); : > /root/full; } '
                '>/dev/null 2>&1 &')
        home = f'/proc/{self.host.info(bomb)["pid"]}/root/root'
        os.close(os.open(f'{home}/go', os.O_CREAT | os.O_WRONLY))
        # The first fork that fails ends the shell in the brackets.
        base.wait_for(lambda: os.path.exists(f'{home}/full'),
                      'the bomb to fill its limit')
        pids = self.host.info(bomb)['pids']
        self.assertTrue(60 <= pids <= 64, pids)
        # There is room for the one who enters and maybe for the shell, and
        # for nobody else: it is said in a sentence.
        said = self.host.exec(bomb, [
            'sh', '-c', 'sleep 1000 >/dev/null 2>&1 & sleep 1000 & sleep 1'
        ]).stderr.decode()
        self.assertRegex(said, "^sh: (can't fork|Cannot fork in the cont)")
        self.assertEqual('0', self.sh(victim, 'id -u'))
        self.host.delete(bomb)
        self.assertEqual([], self.traces(bomb))

    def test_one_vcpu_gets_one_cpu_and_less_if_so_asked(self):
        spin = ('for i in 1 2 3; do (while :; do :; done) >/dev/null 2>&1 & '
                'done')
        slow = self.run_container()
        resources = dict(self.host.info(slow)['resources'],
                         cpu_quota_us=20000, cpu_period_us=100000)
        self.host.stop(slow, 30)
        self.host.prepare(slow, {'resources': resources})
        self.host.start_container(slow)
        self.sh(slow, spin)
        began, used = time.monotonic(), self._cpu_seconds(slow)
        time.sleep(4)
        share = ((self._cpu_seconds(slow) - used) /
                 (time.monotonic() - began))
        # An upper bound: how much it really gets depends on the machine.
        self.assertLess(share, 0.3)
        self.assertGreater(share, 0.0)

    def test_full_disk_is_the_guests_own(self):
        victim = self.run_container()
        uuid = self.run_container(disk=64 * base.MIB)
        done = self.host.exec(
            uuid, ['/bin/sh', '-c', 'dd if=/dev/urandom of=/big bs=1M '
                   'count=500'], timeout_s=base.PATIENCE)
        # The second is what a project quota says.
        self.assertThat(done.stderr, matchers.MatchesAny(
            matchers.Contains(b'No space left'),
            matchers.Contains(b'Disk quota exceeded')))
        size = int(self.sh(uuid, 'stat -c %s /big'))
        self.assertLess(size, 64 * base.MIB)
        # What it takes of the host: its own files, and not the difference of
        # the file system's free blocks, which other tests' are as well.
        taken = self.config.instances_dir / uuid
        self.assertLess(sum(p.lstat().st_blocks * 512
                            for p in [taken, *taken.rglob('*')]
                            if p.lstat().st_dev == taken.lstat().st_dev),
                        200 * base.MIB)
        self.sh(victim, 'echo fits > /root/file')
        # df in the guest shows its own size.
        total = int(self.sh(uuid, 'df -k / | tail -1').split()[1])
        self.assertLess(total * 1024, 70 * base.MIB)
        self.assertGreater(total * 1024, 40 * base.MIB)
        # A full disk does not keep it from being rebooted.
        self.host.reboot(uuid, 30)
        self.assertEqual(str(size), self.sh(uuid, 'stat -c %s /big'))

    def test_descriptors_are_limited(self):
        uuid = self.run_container()
        soft, hard = self.sh(uuid, 'ulimit -Sn; ulimit -Hn').split()
        self.assertEqual('1024', soft)
        self.assertGreaterEqual(int(hard), 1024)


class IsolationTestCase(base.HostTestCase):

    def test_each_container_has_ids_of_its_own(self):
        first, second = self.run_container(), self.run_container()
        maps = [self.sh(u, 'cat /proc/self/uid_map').split()
                for u in (first, second)]
        self.assertEqual([['0', '65536']] * 2, [[m[0], m[2]] for m in maps])
        self.assertNotEqual(maps[0][1], maps[1][1])
        for uuid, (_, start, _) in zip((first, second), maps, strict=True):
            self.assertEqual(int(start), self.host.info(uuid)['base_id'])
            pid = self.host.info(uuid)['pid']
            self.assertEqual(int(start), os.stat(f'/proc/{pid}').st_uid)

    def test_wanted_base_id_and_its_conflict(self):
        first = self.run_container()
        taken = self.host.info(first)['base_id']
        spec = self.spec(base_id=taken)
        self.assert_code('no_base_id', self.host.define,
                         '11111111-2222-4333-8444-555555555555', spec)
        spec = self.spec(base_id=taken + 65536 * 7)
        info = self.host.define(
            '11111111-2222-4333-8444-555555555555', spec)
        self.assertEqual(taken + 65536 * 7, info['base_id'])

    def test_no_namespace_is_the_hosts(self):
        uuid = self.run_container()
        pid = self.host.info(uuid)['pid']
        for kind in ('cgroup', 'ipc', 'mnt', 'net', 'pid', 'user', 'uts'):
            self.assertNotEqual(os.readlink(f'/proc/self/ns/{kind}'),
                                os.readlink(f'/proc/{pid}/ns/{kind}'))

    def test_a_layer_is_shared_and_never_written(self):
        first, second = self.run_container(), self.run_container()
        self.sh(first, 'echo mine > /etc/passwd; rm /etc/inittab')
        self.assertNotEqual('mine', self.sh(second, 'cat /etc/passwd'))
        self.sh(second, 'test -e /etc/inittab')

    def test_what_the_seccomp_profile_refuses(self):
        uuid = self.run_container(
            'debian13', memory=1024 * base.MIB, disk=1024 * base.MIB,
            init={'argv': ['/bin/sleep', '10000']})
        script = r'''
import ctypes, errno, os, socket
libc = ctypes.CDLL(None, use_errno=True)
def call(*a):
    ctypes.set_errno(0)
    return 0 if libc.syscall(*a) >= 0 else ctypes.get_errno()
for flag in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000,
             0x20000000, 0x40000000):
    ctypes.set_errno(0)
    r = libc.unshare(flag)
    assert r < 0 and ctypes.get_errno() == errno.EPERM, hex(flag)
if os.uname().machine == 'x86_64':
    assert call(321, 0, 0, 0) == errno.EPERM      # bpf
    assert call(435, 0, 0) == errno.ENOSYS        # clone3
    assert call(425, 1, 0) == errno.ENOSYS        # io_uring_setup
    assert call(444, 0, 0, 1) == errno.ENOSYS     # landlock_create_ruleset
    assert call(246, 0, 0, 0, 0) == errno.EPERM   # kexec_load
    assert call(250, 0, 0) == errno.EPERM         # keyctl
    assert call(304, 0, 0, 0) == errno.EPERM      # open_by_handle_at
for family in (38, 40, 44):
    try:
        socket.socket(family, socket.SOCK_STREAM)
    except OSError as e:
        assert e.errno == errno.EAFNOSUPPORT, (family, e)
    else:
        raise AssertionError(family)
status = open('/proc/self/status').read()
assert 'Seccomp:\t2' in status, status
print('refused')
'''
        done = self.host.exec(
            uuid, ['/usr/bin/python3', '-c', script])
        self.assertEqual(b'refused\n', done.stdout, done.stderr)

    def test_nesting_lets_the_guest_make_namespaces(self):
        argv = ['/usr/bin/unshare', '--uts', 'hostname', 'inner']
        for nesting, code in ((False, 1), (True, 0)):
            uuid = self.run_container(
                'debian13', memory=512 * base.MIB, nesting=nesting,
                init={'argv': ['/bin/sleep', '10000']})
            self.assertEqual(code, self.host.exec(uuid, argv).exit_code)

    def test_host_devices_and_kernel_settings_are_out_of_reach(self):
        uuid = self.run_container()
        for script in (
                'mknod /root/sda b 8 0',
                'echo b > /proc/sysrq-trigger',
                'echo 1 > /proc/sys/kernel/panic',
                '[ -n "$(head -c 16 /proc/kcore)" ]',
                'mount -t ext4 /dev/vda /mnt',
                'echo 1 > /sys/kernel/uevent_seqnum',
                'dmesg -c'):
            done = self.host.exec(uuid, ['/bin/sh', '-c', script])
            self.assertNotEqual(0, done.exit_code, script)

    def test_config_drive_is_read_only_and_complete(self):
        uuid = self.run_container(config_drive={
            'openstack/latest/user_data': 'aGVsbG8='})
        self.assertEqual('hello', self.sh(
            uuid, 'cat /config-drive/openstack/latest/user_data'))
        self.assertNotEqual(0, self.host.exec(
            uuid, ['/bin/touch', '/config-drive/x']).exit_code)
        self.assertEqual('0', self.sh(
            uuid, 'stat -c %u /config-drive/openstack/latest/user_data'))
        for name in ('/etc/x', '../x', 'a/../../x'):
            self.assert_code(
                'invalid', self.host.define,
                '11111111-2222-4333-8444-555555555555',
                self.spec(config_drive={name: 'aGk='}))

    def test_links_in_a_guest_do_not_lead_the_delete_astray(self):
        uuid = self.run_container()
        precious = self.config.state_dir / 'precious'
        precious.mkdir()
        (precious / 'file').write_text('x')
        self.sh(uuid, f'ln -s {precious} /root/link; '
                f'ln -s {self.config.layers_dir} /layers')
        self.host.delete(uuid)
        self.assertTrue((precious / 'file').exists())
        self.assertTrue(self.host.layer_present(self.layer('busybox')))


class LoopDiskTestCase(base.HostTestCase):
    disk_limit = 'loop'

    def test_no_device_is_left_by_a_kill(self):
        uuid = self.run_container()
        devices = subprocess.run(
            ['losetup', '--list', '--noheadings', '--output',
             'BACK-FILE,AUTOCLEAR,DIO'], capture_output=True, text=True,
            check=True, timeout=30).stdout
        line = [x for x in devices.splitlines() if uuid in x]
        # Detaches itself at the last unmount, whoever does that.
        self.assertEqual(['1', '1'], line[0].split()[1:])
        self.host.delete(uuid)
        self.assertEqual([], self.traces(uuid))


class FullHostTestCase(base.HostTestCase):
    """What a container was promised is its own when the host's disk is full.
    """

    disk_limit = 'loop'

    def make_host(self):
        instances = self.config.instances_dir
        instances.mkdir(mode=0o700)
        image = self.config.state_dir / 'small.img'
        base.make_file_system(image, 192, '-m', '0')
        subprocess.run(['mount', '-o', 'loop', image, instances], check=True,
                       timeout=30)
        # The keeper has files there, and ends later.
        self.addCleanup(subprocess.run, ['umount', '--lazy', instances],
                        check=True, timeout=30)
        return super().make_host()

    def test_writes_go_on(self):
        uuid = self.run_container(disk=64 * base.MIB)
        self.wait_started(uuid)
        other = '11111111-2222-4333-8444-555555555555'
        error = self.assert_code(
            'no_space', self.host.define, other,
            self.spec(disk=160 * base.MIB))
        self.assertIn('160 MiB', str(error))
        self.assertEqual([], self.traces(other))
        self.host.kill(uuid)
        size = 512 * base.MIB
        self.assert_code(
            'no_space', self.host.prepare, uuid,
            {'resources': {**self.spec()['resources'], 'disk_bytes': size}})
        self.host.prepare(uuid)
        self.host.start_container(uuid)
        filler = self.config.instances_dir / 'filler'
        with open(filler, 'wb', buffering=0) as f, contextlib.suppress(
                OSError):
            while f.write(bytes(base.MIB)):
                pass
        self.sh(uuid, 'yes | dd bs=1M count=48 iflag=fullblock conv=fsync '
                'of=/file; sync')
        self.assertLess(
            os.statvfs(self.config.instances_dir).f_bavail, 1024)
        before = self.sh(uuid, 'md5sum /file')
        filler.unlink()
        self.host.kill(uuid)
        self.host.prepare(uuid)
        self.host.start_container(uuid)
        self.assertEqual(before, self.sh(uuid, 'md5sum /file'))


class DiskSpeedTestCase(base.HostTestCase):
    disk_limit = 'loop'

    def test_reads_and_writes(self):
        if not base.limits_io():
            self.skipTest('this machine has no controller io or blkio')
        resources = {
            **self.spec()['resources'], 'disk_io': {
                'read_bytes_s': 4 * base.MIB, 'write_bytes_s': 8 * base.MIB}}
        uuid = self.run_container(
            'debian13', init={'argv': ['/bin/sleep', '1000']},
            resources=resources)
        for words, least in (('if=/dev/zero of=/file oflag=direct', 1.5),
                             ('if=/file of=/dev/null iflag=direct', 3.0)):
            began = time.monotonic()
            self.sh(uuid, f'dd bs=1M count=16 {words}')
            # A lower bound: how long it really takes depends on the machine.
            self.assertGreater(time.monotonic() - began, least)
        self.host.kill(uuid)
        # As after a change of its flavor.
        self.host.prepare(uuid, {'resources': {
            **resources, 'disk_io': {'write_iops': 20}}})
        self.host.start_container(uuid)
        began = time.monotonic()
        self.sh(uuid, 'dd if=/dev/zero of=/file bs=4k count=60 oflag=direct')
        self.assertGreater(time.monotonic() - began, 1.5)


class FailuresTestCase(base.HostTestCase):
    """A step that fails leaves nothing, whichever it is."""

    def test_each_step_of_define_and_prepare(self):
        names = []
        uuid = '11111111-2222-4333-8444-555555555555'

        def record(name):
            names.append(name)

        revert.fault_hook = record
        self.addCleanup(setattr, revert, 'fault_hook', None)
        spec = self.spec(config_drive={'a': 'aGk='}, nics=[{
            'id': '0123456789abc', 'devname': 'tap0123456789a',
            'mac': 'fa:16:3e:00:00:01', 'mtu': 1400, 'tx_offload': True}])
        self.host.define(uuid, spec)
        self.host.prepare(uuid)
        self.host.delete(uuid)
        self.assertGreater(len(names), 10)

        for failing in names:
            def fault(name, failing=failing):
                if name == failing:
                    raise OSError(5, 'injected')

            revert.fault_hook = fault
            try:
                self.host.define(uuid, spec)
                self.host.prepare(uuid)
            except errors.ContainerError as e:
                self.assertEqual(failing, e.step)
                self.assertIn('injected', str(e))
            else:
                self.fail(f'step {failing} did not fail')
            revert.fault_hook = None
            if self.host.list():
                # "prepare" failed: what "define" made is whole and usable.
                self.assertEqual('defined', self.state(uuid))
                left = [t for t in self.traces(uuid)
                        if str(self.config.instances_dir) not in t or
                        ' - ' in t]
                self.assertEqual([], left, failing)
                self.host.prepare(uuid)
                self.host.start_container(uuid)
            self.host.delete(uuid)
            self.assertEqual([], self.traces(uuid), failing)
            done = subprocess.run(
                ['ip', 'link', 'show', 'tap0123456789a'],
                capture_output=True, timeout=30)
            self.assertNotEqual(0, done.returncode, failing)
