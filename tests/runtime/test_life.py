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

"""Life of a container: start, end, reboot, pause, in each kind of image."""

import os
import signal
import subprocess
import threading
import time
import uuid as uuidlib

from nova_pycontainer.runtime import host
from nova_pycontainer.runtime.migration import network_lock
from nova_pycontainer.runtime import network
from tests.runtime import base


class LifeTestCase(base.HostTestCase):

    def test_busybox_from_define_to_delete(self):
        uuid = str(uuidlib.uuid4())
        self.assertEqual('defined', self.host.define(
            uuid, self.spec())['state'])
        info = self.host.prepare(uuid)
        self.assertEqual('created', info['state'])
        # The init waits: nothing of the image has run.
        self.assertEqual(b'', self.host.console_log(uuid))
        self.assertEqual('running', self.host.start_container(uuid)['state'])
        self.assertEqual('0', self.sh(uuid, 'id -u'))
        self.assertEqual('test', self.sh(uuid, 'hostname'))
        self.assertEqual([uuid], [i['uuid'] for i in self.host.list()])
        self.host.delete(uuid)
        self.assertEqual([], self.host.list())
        self.assertEqual([], self.traces(uuid))
        # Deleting what is not there is no error: Nova does it.
        self.host.delete(uuid)

    def test_files_survive_a_stop(self):
        uuid = self.run_container()
        self.wait_started(uuid)
        self.sh(uuid, 'echo kept > /root/file; sync')
        ended = self.host.stop(uuid, base.PATIENCE)
        # busybox init: power off, so SIGINT to the PID namespace's init.
        self.assertEqual(signal.SIGINT, ended['signal'])
        self.assertEqual('stopped', self.state(uuid))
        self.assertIn(b'poweroff', self.host.console_log(uuid))
        self.host.prepare(uuid)
        self.host.start_container(uuid)
        self.assertEqual('kept', self.sh(uuid, 'cat /root/file'))

    def test_stopped_container_holds_nothing(self):
        uuid = self.run_container()
        self.host.stop(uuid, 30)
        left = [t for t in self.traces(uuid)
                if str(self.config.instances_dir) not in t or ' - ' in t]
        self.assertEqual([], left)

    def test_stop_is_idempotent_and_tells_the_same_end(self):
        uuid = self.run_container()
        first = self.host.stop(uuid, 30)
        self.assertEqual(first, self.host.stop(uuid, 30))

    def test_init_that_ignores_the_signal_is_killed(self):
        uuid = self.run_container(init={'argv': [
            '/bin/sh', '-c', 'trap "" TERM; while :; do sleep 1; done']})
        ended = self.host.stop(uuid, 1)
        self.assertEqual(signal.SIGKILL, ended['signal'])

    def test_any_program_and_its_exit_status(self):
        uuid = self.run_container(init={'argv': [
            '/bin/sh', '-c', 'echo hello; exit 7']})
        self.wait_state(uuid, 'stopped')
        ended = self.host.info(uuid)['exit']
        self.assertEqual((7, None), (ended['code'], ended['signal']))
        self.assertIn(b'hello', self.host.console_log(uuid))

    def test_own_stop_signal_and_environment(self):
        uuid = self.run_container(init={
            'argv': ['/bin/sh', '-c',
                     'trap "echo $WORD; exit 3" USR1; echo ready; '
                     'while :; do sleep 1 & wait; done'],
            'env': {'WORD': 'goodbye'}, 'stop_signal': 'SIGUSR1'})
        # A signal that comes before its trap is lost.
        self.wait_console(uuid, 'ready')
        self.assertEqual(3, self.host.stop(uuid, base.PATIENCE)['code'])
        self.assertIn(b'goodbye', self.host.console_log(uuid))

    def test_stop_before_the_init_heeds_its_signal(self):
        uuid = self.run_container(init={
            'argv': ['/bin/sh', '-c', 'sleep 2; trap "exit 3" USR1; '
                     'while :; do sleep 1 & wait; done'],
            'stop_signal': 'SIGUSR1'})
        self.assertEqual(3, self.host.stop(uuid, base.PATIENCE)['code'])

    def test_guest_that_powers_off_is_stopped_with_an_event(self):
        uuid = self.run_container()
        self.wait_started(uuid)
        seen = self.host.events(-1, 0)[-1].seq
        self.sh_end(uuid, 'poweroff')
        event = self.host.events(seen, base.PATIENCE)[0]
        self.assertEqual(('stopped', uuid), (event.type, event.uuid))
        self.assertEqual('stopped', self.state(uuid))

    def test_guest_that_reboots_comes_back(self):
        uuid = self.run_container()
        self.wait_started(uuid)
        seen = self.host.events(-1, 0)[-1].seq
        first = self.host.info(uuid)['pid']
        self.sh(uuid, 'echo kept > /root/file; sync')
        self.sh_end(uuid, 'reboot')
        event = self.host.events(seen, base.PATIENCE)[0]
        self.assertEqual(('rebooted', uuid), (event.type, event.uuid))
        self.assertEqual('running', self.state(uuid))
        self.assertNotEqual(first, self.host.info(uuid)['pid'])
        self.assertEqual('kept', self.sh(uuid, 'cat /root/file'))

    def test_reboot_soft_and_hard(self):
        uuid = self.run_container()
        for timeout in (30, 0):
            pid = self.host.info(uuid)['pid']
            self.sh(uuid, 'touch /run/volatile')
            self.host.reboot(uuid, timeout)
            self.assertEqual('running', self.state(uuid))
            self.assertNotEqual(pid, self.host.info(uuid)['pid'])
            self.assertEqual('', self.sh(uuid, 'ls /run/volatile || true'))

    def test_pause_stops_the_guest_and_its_clock_of_work(self):
        uuid = self.run_container()
        self.sh(uuid, '(while :; do echo x >> /root/ticks; sleep 0.05; done) '
                '>/dev/null 2>&1 &')
        upper = self.config.instances_dir / uuid / 'disk/upper/root/ticks'
        base.wait_for(upper.exists, 'the first tick')
        self.assertEqual('paused', self.host.pause(uuid)['state'])
        size = upper.stat().st_size
        time.sleep(0.5)
        self.assertEqual(size, upper.stat().st_size)
        self.assert_code('bad_state', self.host.exec, uuid, ['/bin/true'])
        self.assertEqual('running', self.host.unpause(uuid)['state'])
        base.wait_for(lambda: upper.stat().st_size > size, 'more ticks')

    def test_paused_container_can_be_stopped_and_deleted(self):
        uuid = self.run_container()
        self.wait_started(uuid)
        self.host.pause(uuid)
        self.assertEqual(
            signal.SIGINT, self.host.stop(uuid, base.PATIENCE)['signal'])
        self.host.prepare(uuid)
        self.host.start_container(uuid)
        self.host.pause(uuid)
        self.host.delete(uuid)
        self.assertEqual([], self.traces(uuid))

    def test_verbs_in_the_wrong_state(self):
        uuid = self.run_container()
        self.assert_code('exists', self.host.define, uuid, self.spec())
        self.assert_code('bad_state', self.host.prepare, uuid)
        self.assert_code('bad_state', self.host.start_container, uuid)
        self.host.stop(uuid, 30)
        self.assert_code('bad_state', self.host.pause, uuid)
        self.assert_code('bad_state', self.host.exec, uuid, ['/bin/true'])
        other = str(uuidlib.uuid4())
        self.assert_code('not_found', self.host.info, other)
        self.assert_code('invalid', self.host.info, '../../etc')

    def test_deleted_but_for_its_files(self):
        """It is files until it is started, also to an agent's successor."""
        uuid = self.run_container()
        self.wait_started(uuid)
        self.sh(uuid, 'echo x > /file')
        self.host.delete(uuid, keep_disk=True)
        self.host.close()
        self.host = self.make_host()
        info = self.host.info(uuid)
        self.assertEqual(('stopped', True), (info['state'], info['kept']))
        self.host.prepare(uuid)
        self.host.start_container(uuid)
        self.assertIs(False, self.host.info(uuid)['kept'])
        self.assertEqual('x', self.sh(uuid, 'cat /file'))

    def test_delete_while_a_stop_waits(self):
        uuid = self.run_container(init={'argv': [
            '/bin/sh', '-c', 'trap "" TERM; while :; do sleep 1; done']})
        errors = []

        def stop():
            try:
                self.host.stop(uuid, base.PATIENCE)
            except Exception as e:
                errors.append(e)

        thread = threading.Thread(target=stop)
        thread.start()
        time.sleep(0.5)
        self.host.delete(uuid)
        thread.join(base.PATIENCE)
        self.assertFalse(thread.is_alive())
        self.assertEqual(['not_found'], [e.code for e in errors])
        self.assertEqual([], self.traces(uuid))

    def test_exec_output_input_and_limits(self):
        uuid = self.run_container()
        done = self.host.exec(uuid, ['/bin/cat'], stdin=b'x' * 300000)
        self.assertEqual(b'x' * 300000, done.stdout)
        done = self.host.exec(
            uuid, ['/bin/sh', '-c', 'echo $A; echo e >&2; exit 4'],
            env={'A': 'value'})
        self.assertEqual((4, b'value\n', b'e\n'),
                         (done.exit_code, done.stdout, done.stderr))
        done = self.host.exec(
            uuid, ['/bin/sh', '-c', 'head -c 100000 /dev/zero'],
            max_output=1000)
        self.assertEqual((1000, True), (len(done.stdout), done.truncated))
        self.assert_code('timeout', self.host.exec, uuid,
                         ['/bin/sleep', '1000'], timeout_s=1)
        # The program is gone too, not only the wait for it.
        base.wait_for(lambda: self.sh(
            uuid, 'ps | grep -c "[s]leep 1000" || true') == '0',
            'the end of sleep')

    def test_a_restarted_host_finds_its_containers(self):
        uuid = self.run_container()
        stopped = self.run_container()
        ended = self.host.stop(stopped, 30)
        pid = self.host.info(uuid)['pid']
        self.host.close()
        self.host = self.make_host()
        info = self.host.info(uuid)
        self.assertEqual(('running', pid), (info['state'], info['pid']))
        self.assertEqual('0', self.sh(uuid, 'id -u'))
        self.wait_started(uuid)
        self.assertEqual(ended, self.host.info(stopped)['exit'])
        self.assertEqual(
            signal.SIGINT, self.host.stop(uuid, base.PATIENCE)['signal'])

    def test_an_exit_while_no_host_looks_is_not_lost(self):
        uuid = self.run_container(init={'argv': [
            '/bin/sh', '-c', 'while [ ! -e /go ]; do sleep 0.1; done; '
            'exit 9']})
        pid = self.host.info(uuid)['pid']
        root = f'/proc/{pid}/root/go'
        self.host.close()
        os.close(os.open(root, os.O_CREAT | os.O_WRONLY))
        base.wait_for(lambda: not os.path.exists(f'/proc/{pid}'), 'the end')
        self.host = self.make_host()
        self.assertEqual('stopped', self.state(uuid))
        self.assertEqual(9, self.host.info(uuid)['exit']['code'])
        event = self.host.events(-1, 0)[-1]
        self.assertEqual(('stopped', uuid), (event.type, event.uuid))
        self.host.delete(uuid)
        self.assertEqual([], self.traces(uuid))

    def test_leftovers_of_a_killed_host_are_cleaned_up(self):
        # What a kill in the middle of "define" and of "prepare" leaves.
        uuid, half = str(uuidlib.uuid4()), str(uuidlib.uuid4())
        self.host.define(uuid, self.spec())
        item = self.host.entry(uuid).container
        item.disk.mount()
        item.bundle.mkdir(parents=True)
        (self.config.instances_dir / half / 'disk').mkdir(parents=True)
        self.host.close()
        self.host = host.Host(self.config)
        self.host.start()
        self.addCleanup(self.host.close)
        self.assertEqual('defined', self.state(uuid))
        self.assertEqual([], self.traces(half))
        self.assertEqual([], [t for t in self.traces(uuid) if ' - ' in t])
        self.host.prepare(uuid)
        self.host.start_container(uuid)
        self.assertEqual('0', self.sh(uuid, 'id -u'))

    def test_twenty_at_once(self):
        self.layer('busybox')
        uuids = [str(uuidlib.uuid4()) for _ in range(20)]
        errors = []

        def life(uuid):
            try:
                self.run_container(uuid=uuid, disk=64 * base.MIB)
                self.sh(uuid, 'true')
                self.host.delete(uuid)
            except Exception as e:
                errors.append(e)

        threads = [threading.Thread(target=life, args=(u,)) for u in uuids]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual([], errors)
        self.assertEqual([], [t for u in uuids for t in self.traces(u)])


class RuncTestCase(base.HostTestCase):
    """The alternative OCI runtime."""

    runtime = 'runc'

    def test_life(self):
        self.assertEqual(
            'runc', self.host.host_info()['oci_runtime']['name'])
        uuid = self.run_container()
        self.assertEqual('0', self.sh(uuid, 'id -u'))
        self.wait_started(uuid)
        self.host.pause(uuid)
        self.host.unpause(uuid)
        self.assertEqual(
            signal.SIGINT, self.host.stop(uuid, base.PATIENCE)['signal'])
        self.host.delete(uuid)
        self.assertEqual([], self.traces(uuid))


class SystemsTestCase(base.HostTestCase):
    """Unmodified distributions come up whole and shut down by themselves."""

    def _check_systemd(self, name, version):
        nic = self.dhcp_nic()
        # {"uuid": "i-x"}
        metadata = 'eyJ1dWlkIjogImkteCJ9'
        uuid = self.run_container(
            name, memory=1024 * base.MIB, disk=2048 * base.MIB, nics=[nic],
            config_drive={
                'openstack/latest/meta_data.json': metadata,
                'openstack/2015-10-15/meta_data.json': metadata})
        self.give_address(nic)
        done = base.wait_for(lambda: self._settled(uuid), 'systemd to settle',
                             240)
        failed = self.sh(uuid, 'systemctl --failed --no-legend --plain',
                         check=False)
        self.assertEqual('running', done, failed)
        self.assertIn(version, self.sh(uuid, 'cat /etc/debian_version'))
        # What systemd makes of "oci", once no manager of app containers shows.
        self.assertEqual(
            'container-other', self.sh(uuid, 'systemd-detect-virt'))
        self.assertIn('DefaultMemoryPressureWatch=off', self.sh(
            uuid, 'cat /run/systemd/system.conf.d/50-pycontainer.conf'))
        # The disks of the host are not its own.
        self.assertEqual('', self.sh(
            uuid, 'lsblk --noheadings --all; ls /sys/dev/block'))
        # Nothing that CRIU could not dump: only pid 1's own namespaces.
        self.assertEqual('', self.sh(uuid, '''
            for ns in uts ipc user pid mnt net; do
                for p in /proc/[0-9]*; do
                    a=$(readlink $p/ns/$ns) || continue
                    [ "$a" = "$(readlink /proc/1/ns/$ns)" ] || echo "$p $a"
                done
            done'''))
        self.assertEqual(
            signal.SIGINT, self.host.stop(uuid, base.PATIENCE)['signal'])

    def _settled(self, uuid):
        state = self.sh(uuid, 'systemctl is-system-running', check=False)
        return state if state in ('running', 'degraded') else None

    def test_debian13_systemd(self):
        self._check_systemd('debian13', '13.')

    def test_debian12_systemd(self):
        self._check_systemd('debian12', '12.')

    def test_debian_sysvinit(self):
        uuid = self.run_container('sysvinit', memory=512 * base.MIB,
                                  disk=2048 * base.MIB)
        base.wait_for(lambda: self.sh(
            uuid, 'runlevel', check=False).endswith(' 2'), 'runlevel 2', 240)
        ended = self.host.stop(uuid, base.PATIENCE)
        self.assertEqual(signal.SIGINT, ended['signal'])


class ConsoleTestCase(base.HostTestCase):

    def test_log_is_bounded(self):
        uuid = self.run_container(init={'argv': [
            '/bin/sh', '-c', 'i=0; while [ $i -lt 60000 ]; do '
            'echo "line $i of a long, long, long console log"; '
            'i=$((i + 1)); done; echo end of output; sleep 1000']})
        self.wait_console(uuid, 'end of output')
        directory = self.config.instances_dir / uuid
        size = sum(p.stat().st_size for p in directory.glob('console.log*'))
        self.assertLessEqual(size, self.config.console_log_bytes)
        self.assertEqual(1000, len(self.host.console_log(uuid, 1000)))

    def test_two_way_console(self):
        uuid = self.run_container(init={'argv': [
            '/bin/sh', '-c', 'read word; echo "it was $word"; sleep 1000']})
        with self.host.consoles.attach(uuid) as sock:
            sock.settimeout(base.PATIENCE)
            sock.sendall(b'melon\n')
            seen = b''
            while b'it was melon' not in seen:
                data = sock.recv(4096)
                self.assertTrue(data, seen)
                seen += data
        self.wait_console(uuid, 'it was melon')

    def test_log_goes_on_over_stop_and_start(self):
        uuid = self.run_container(init={'argv': [
            '/bin/sh', '-c', 'n=$(cat /n); echo x >> /n; echo started $n; '
            'sleep 1000']})
        # Its file is written by then.
        self.wait_console(uuid, 'started')
        self.host.reboot(uuid, 0)
        self.wait_console(uuid, 'started x')


class NetworkTestCase(base.HostTestCase):

    def _nic(self, n):
        ident = f'{n:02d}' + uuidlib.uuid4().hex[:9]
        return {'id': ident + '-x', 'devname': 'tap' + ident,
                'mac': f'fa:16:3e:00:00:{n:02x}', 'mtu': 1400 + n,
                'tx_offload': False}

    def _outer(self):
        done = subprocess.run(['ip', '-o', 'link'], capture_output=True,
                              text=True, check=True, timeout=30)
        return [line.split()[1].split('@')[0].rstrip(':')
                for line in done.stdout.splitlines()
                if 'tap' in line or 'nic' in line]

    def test_interfaces_parked_then_moved_and_reachable(self):
        nics = [self._nic(1), self._nic(2)]
        uuid = str(uuidlib.uuid4())
        self.host.define(uuid, self.spec(nics=nics))
        self.host.plug(uuid, nics)
        self.host.plug(uuid, nics)
        self.assertEqual(4, len(self._outer()))
        self.host.prepare(uuid)
        self.assertEqual(2, len(self._outer()))
        self.host.start_container(uuid)
        for position, nic in enumerate(nics):
            shown = self.sh(uuid, f'ip link show eth{position}')
            self.assertIn(nic['mac'], shown)
            self.assertIn(f'mtu {nic["mtu"]}', shown)
        subprocess.run(
            ['ip', 'address', 'add', '203.0.113.1/24', 'dev',
             nics[0]['devname']], check=True, timeout=30)
        self.sh(uuid, base.NO_DHCP +
                'ip address add 203.0.113.2/24 dev eth0; '
                'ip link set eth0 up')
        base.ping('203.0.113.2')
        counters = self.host.info(uuid)['nics'][0]['statistics']
        self.assertGreater(counters['rx_packets'], 0)
        # Plugging what the container has changes nothing: Nova does it for
        # every instance at each start of nova-compute.
        self.host.plug(uuid, nics)
        self.sh(uuid, 'ip link show eth0')
        self.host.reboot(uuid, 0)
        self.sh(uuid, 'ip link show eth1')
        self.host.stop(uuid, 30)
        self.assertEqual([], self._outer())
        self.host.unplug(uuid, [n['devname'] for n in nics])

    def test_statistics_of_an_interface_on_its_way_out(self):
        nic = network.Nic.from_dict(self._nic(1))
        over = threading.Event()

        def come_and_go():
            while not over.is_set():
                for command in (['add', nic.devname, 'type', 'veth'],
                                ['delete', nic.devname]):
                    subprocess.run(['ip', 'link', *command], check=True,
                                   timeout=30)

        thread = threading.Thread(target=come_and_go)
        thread.start()
        self.addCleanup(thread.join, base.PATIENCE)
        self.addCleanup(over.set)
        seen = set()
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            found = network.statistics(nic)
            seen.add(found and found['rx_octets'])
        self.assertEqual({None, 0}, seen)

    def test_nothing_leaves_a_guest_that_runs_elsewhere(self):
        uuid = self.run_container()
        pid = self.host.info(uuid)['pid']
        ping = 'ping -c 1 -W 2 127.0.0.1 >/dev/null && echo yes || echo no'
        self.assertEqual('yes', self.sh(uuid, ping))
        network_lock.block(pid)
        self.assertEqual('no', self.sh(uuid, ping))
        network_lock.remove(pid, self.host.entry(uuid).container.cgroup)
        self.assertEqual('yes', self.sh(uuid, ping))

    def test_failed_plug_takes_back_what_it_made(self):
        good, bad = self._nic(1), self._nic(2)
        bad['id'] = good['id']
        uuid = str(uuidlib.uuid4())
        self.assert_code('network', self.host.plug, uuid, [good, bad])
        self.assertEqual([], self._outer())

    def test_only_instances_links_can_be_touched(self):
        self.assert_code('invalid', self.host.unplug,
                         str(uuidlib.uuid4()), ['lo'])
