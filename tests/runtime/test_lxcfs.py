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


"""What a guest sees of memory, CPUs and time is its own: lxcfs, and clocks.
"""

import functools
import shutil
import subprocess
import time

from nova_pycontainer.runtime import errors
from tests import cases
from tests.runtime import base
from tests.runtime import hosts

DIRECTORY = '/run/shares'
#: Keeps every file open, one of them half read.
HOLDER = '''
exec 3</proc/loadavg 4</proc/meminfo 5</proc/cpuinfo 6</proc/diskstats
exec 7</proc/swaps 8</sys/devices/system/cpu/online
read line <&4
echo $$ > /root/holder
while :; do sleep 1; done
'''
READER = '''
import os, time
with open("/proc/meminfo") as memory, open("/proc/loadavg") as load:
    while True:
        memory.seek(0), load.seek(0)
        line = memory.readline()
        load.read()
        with open("/root/read.new", "w") as f:
            f.write(f"{line.split()[1]} {time.time():.3f}")
        os.rename("/root/read.new", "/root/read")
        time.sleep(0.1)
'''
UPTIME = 'cut -d" " -f1 /proc/uptime'


class SharesTestCase(hosts.TwoHostsTestCase):

    agent_options = {'lxcfs_dir': DIRECTORY}

    def setUp(self):
        if shutil.which('lxcfs') is None:
            self.skipTest('there is no lxcfs; run tools/lib/packages.sh')
        self.running = {}
        super().setUp()
        for host in (self.a, self.b):
            self.start_lxcfs(host)

    def _host(self, name, address):
        # After the host has ended, which ends its guests.
        self.addCleanup(self._end, name)
        return super()._host(name, address)

    def start_lxcfs(self, host):
        with (self.top / f'lxcfs-{host.name}.log').open('ab') as log:
            self.running[host.name] = subprocess.Popen(
                host.enter(str(base.ROOT / 'tools/lib/lxcfs.sh'), DIRECTORY),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        base.wait_for(lambda: host.run(
            'test', '-e', f'{DIRECTORY}/proc/meminfo',
            check=False).returncode == 0, self._log(host.name))

    def _log(self, name):
        return 'lxcfs: ' + (self.top / f'lxcfs-{name}.log').read_text()

    def stop_lxcfs(self, host, kill=False):
        """:param kill: it leaves its mount behind, as a crash does"""
        process = self.running.pop(host.name)
        process.kill() if kill else process.terminate()
        process.wait(base.PATIENCE)
        if kill:
            # As its unit does (ExecStopPost).
            host.run('umount', '--lazy', DIRECTORY)
        base.wait_for(lambda: host.run(
            'test', '-e', f'{DIRECTORY}/proc', check=False).returncode,
            'the end of the mount')

    def _end(self, name):
        process = self.running.pop(name, None)
        if process is not None:
            process.terminate()
            process.wait(base.PATIENCE)

    def assert_own(self, host, uuid, memory):
        """:param memory: the limit, in MiB"""
        found = self.sh(host, uuid, '''
            grep ^MemTotal: /proc/meminfo
            grep -c ^processor /proc/cpuinfo
            cat /sys/devices/system/cpu/online
            cut -d" " -f4 /proc/loadavg
            free | grep ^Mem:
        ''').splitlines()
        self.assertEqual(['MemTotal:', str(memory << 10), 'kB'],
                         found[0].split())
        self.assertEqual(['1', '0'], found[1:3])
        # Processes: the host has a hundred of kernel threads alone.
        self.assertLess(int(found[3].split('/')[1]), 60)
        return int(found[4].split()[1])

    def uptime(self, host, uuid):
        return float(self.sh(host, uuid, UPTIME))

    def busybox(self):
        began = time.time()
        uuid = self.run_container(address='203.0.113.10')
        self.sh(self.a, uuid,
                f"cat > /root/hold <<'.'\n{HOLDER}.\n"
                'setsid sh /root/hold </dev/null >/dev/null 2>&1 &')
        base.wait_for(lambda: self.sh(
            self.a, uuid, 'cat /root/holder || :'), 'the holder')
        self.assert_time(self.a, uuid, began)
        return uuid, began

    def assert_time(self, host, uuid, began):
        """Its clocks began with it, and processes begin by them."""
        up = self.uptime(host, uuid)
        self.assertGreater(up, 0)
        self.assertLess(up, time.time() - began + 1)
        # busybox asks the kernel by sysinfo(2).
        self.assertRegex(self.sh(host, uuid, 'uptime'), r'up \d min')
        # Of the shell that reads it, since the boot, in ticks.
        started = int(self.sh(
            host, uuid, 'cut -d" " -f22 /proc/$$/stat')) / 100
        self.assertLessEqual(abs(started - up), 5)
        boot = int(self.sh(
            host, uuid, "sed -n 's/^btime //p' /proc/stat"))
        self.assertLessEqual(abs(boot + up - time.time()), 30)

    def assert_held(self, host, uuid):
        self.assertEqual(
            '/proc/loadavg', self.sh(
                host, uuid, 'readlink /proc/$(cat /root/holder)/fd/3'))

    def test_busybox_there_and_back(self):
        uuid, began = self.busybox()
        self.assert_own(self.a, uuid, 256)
        here, there = self.a, self.b
        for _ in range(4):
            up = self.uptime(here, uuid)
            facts = here.migration_check_source(uuid)
            self.assertEqual([], facts['problems'])
            self.assertEqual(6, len(facts['facts']['lxcfs']))
            self.assertEqual([], there.migration_check_destination(
                facts['facts'])['problems'])
            self.migrate(uuid, here, there)
            here, there = there, here
            self.assertGreater(self.uptime(here, uuid), up)
            self.assert_own(here, uuid, 256)
            self.assert_time(here, uuid, began)
            self.assert_held(here, uuid)

    def test_suspend_and_resume(self):
        uuid, began = self.busybox()
        for _ in range(2):
            up = self.uptime(self.a, uuid)
            self.a.suspend(uuid)
            self.a.resume(uuid)
            self.attach(self.a, uuid)
            self.assertGreater(self.uptime(self.a, uuid), up)
            self.assert_own(self.a, uuid, 256)
            self.assert_time(self.a, uuid, began)
            self.assert_held(self.a, uuid)
        self.a.suspend(uuid)
        self.stop_lxcfs(self.a)
        error = self.assertRaises(
            errors.ContainerError, self.a.resume, uuid)
        self.assertEqual('unsupported', error.code, str(error))
        self.assertIn('lxcfs', error.remedy)
        self.assertEqual('suspended', self.a.info(uuid)['state'])
        self.start_lxcfs(self.a)
        self.a.resume(uuid)
        self.assert_own(self.a, uuid, 256)
        self.assert_held(self.a, uuid)

    @cases.more
    def test_a_host_without(self):
        uuid, _ = self.busybox()
        self.stop_lxcfs(self.b)
        facts = self.a.migration_check_source(uuid)['facts']
        problem, = self.b.migration_check_destination(facts)['problems']
        self.assertEqual('lxcfs', problem['name'])
        self.assertIn('/proc/meminfo', problem['reason'])
        self.assertIn(DIRECTORY, problem['remedy'])
        # Who does not check finds out in the middle.
        error = self.assertRaises(
            AssertionError, self.migrate, uuid, self.a, self.b)
        self.assertIn('lxcfs', str(error))
        base.wait_for(lambda: self.a.info(uuid)['migration'] is None,
                      'the end of the migration')
        self.assertEqual('running', self.a.info(uuid)['state'])
        self.assert_own(self.a, uuid, 256)
        self.assert_held(self.a, uuid)
        # One that starts there is one without, and goes anywhere.
        plain = self.run_container(host=self.b)
        self.assertEqual('', self.sh(
            self.b, plain, 'grep fuse.lxcfs /proc/self/mountinfo || :'))
        self.migrate(plain, self.b, self.a)
        self.assertLess(self.uptime(self.a, plain), 60)

    def test_one_that_has_crashed(self):
        uuid, _ = self.busybox()
        self.stop_lxcfs(self.a, kill=True)
        self.start_lxcfs(self.a)
        self.assertIn('not connected', self.sh(
            self.a, uuid, 'cat /proc/meminfo 2>&1 || :'))
        # Each file of each process.
        problems = self.a.migration_check_source(uuid)['problems']
        self.assertEqual({'lxcfs'}, {p['name'] for p in problems})
        self.assertIn('sh (pid', str(problems))
        # Another container has the new one, and this one gets it by moving
        # once it has let go of the files of the old one.
        other = self.run_container()
        self.assert_own(self.a, other, 256)
        self.sh(self.a, uuid, 'kill $(cat /root/holder)')
        base.wait_for(lambda: not self.sh(
            self.a, uuid, 'pidof sleep || :'), 'its child to end')
        self.migrate(uuid, self.a, self.b)
        self.assert_own(self.b, uuid, 256)

    @cases.more
    def test_not_used(self):
        self.a.restart_agent(lxcfs_dir='none')
        uuid = self.run_container()
        self.assertEqual('', self.sh(
            self.a, uuid, 'grep fuse.lxcfs /proc/self/mountinfo || :'))
        self.assertLess(self.uptime(self.a, uuid), 60)

    def test_debian13(self):
        began = time.time()
        self.dhcp()
        uuid = self.run_container(
            'debian13', memory=1024, address=None, nics=[{
                'id': '0123456789a-x', 'devname': 'tap0123456789a',
                'mac': 'fa:16:3e:00:00:32', 'mtu': 1500,
                'tx_offload': True}], init={
                    'argv': ['/sbin/init', 'cloud-init=disabled']})
        state = 'systemctl is-system-running || :'
        base.wait_for(lambda: self.sh(self.a, uuid, state) in (
            'running', 'degraded'), 'systemd', 240)
        # Without cloud-init there are no keys for ssh.
        failing = ('systemctl --failed --plain --no-legend | '
                   'grep -v ^ssh || :')
        failed = self.sh(self.a, uuid, failing)
        self.sh(self.a, uuid,
                f"cat > /root/reader <<'.'\n{READER}.\n"
                'systemd-run --unit=reader python3 /root/reader; '
                'systemd-run --unit=top --setenv=TERM=dumb top -b -d 1')
        here, there = self.a, self.b
        for move in range(3):
            if move:
                up = self.uptime(here, uuid)
                facts = here.migration_check_source(uuid)
                self.assertEqual([], facts['problems'])
                self.migrate(uuid, here, there)
                here, there = there, here
                self.assertGreater(self.uptime(here, uuid), up)
            # procps takes its numbers from /proc.
            self.assertEqual(1024 << 10, self.assert_own(here, uuid, 1024))
            self.assert_clock(here, uuid, began)
            base.wait_for(
                functools.partial(self._read, here, uuid), 'the reader')
            self.sh(here, uuid, 'systemctl is-active reader top')
            self.assertEqual(failed, self.sh(here, uuid, failing))

    def assert_clock(self, host, uuid, began):
        self.assertLess(self.uptime(host, uuid), time.time() - began + 1)
        start = int(self.sh(
            host, uuid, 'date -d "$(ps -o lstart= -p 1)" +%s'))
        # A guest's clocks stand still while it does.
        self.assertLess(began - 2, start)
        self.assertLess(start, time.time())

    def _read(self, host, uuid):
        total, when = self.sh(host, uuid, 'cat /root/read').split()
        self.assertEqual(str(1024 << 10), total)
        return time.time() - float(when) < 1
