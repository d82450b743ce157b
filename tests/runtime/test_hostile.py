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

"""Guests that attack their host.

Named after the classes of vulnerabilities that container runtimes have had;
each does what would succeed against a runtime that takes no care.
"""

import hashlib
import os
import pathlib
import re
import struct
import subprocess
import sys
import time

from nova_pycontainer.runtime import errors
from tests.runtime import base

#: linux/capability.h: of the attribute of a file.
_CAP_REVISION_3 = 0x03000000
_CAP_EFFECTIVE = 1
_DAC_OVERRIDE = 1 << 1
#: Writes to whatever program of the host shows up in the guest.
_OVERWRITE = """
while :; do
  for exe in /proc/[0-9]*/exe; do
    case $(readlink $exe) in
      /bin/busybox|'') ;;
      *) readlink $exe >> /root/seen
         if (: >> $exe) 2>/dev/null; then touch /root/overwritten; fi;;
    esac
  done
done
"""


def _digest(path):
    return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()


class HostileTestCase(base.HostTestCase):

    def background(self, uuid, script):
        self.sh(uuid, "cat > /root/attack <<'EOF'\n" + script + '\nEOF\n'
                'setsid sh /root/attack </dev/null >/dev/null 2>&1 &')

    def pid(self, uuid):
        return self.host.info(uuid)['pid']

    def test_program_of_the_host_in_the_guest(self):
        """CVE-2019-5736: a command whose interpreter is the runtime."""
        uuid = self.run_container()
        before = _digest(sys.executable)
        self.background(uuid, _OVERWRITE)
        # With a loader of the guest's own, which is asked to sleep.
        loader = subprocess.run(
            ['readelf', '--program-headers', sys.executable], check=True,
            capture_output=True, text=True, timeout=30).stdout
        loader = re.search(r'interpreter: (\S+)]', loader)[1]
        self.sh(uuid, f'mkdir -p {os.path.dirname(loader)}; '
                f'cp /bin/busybox {loader}; '
                'ln -s /proc/self/exe /root/sleep; '
                "printf '#!/proc/self/exe\\n' > /root/script; "
                'chmod +x /root/script')
        for argv in (['/root/script'], ['/proc/self/exe', 'sleep', '2']):
            self.host.exec(uuid, argv, timeout_s=base.PATIENCE)

        def seen():
            # The attacker has to come to it while it is there.
            self.host.exec(
                uuid, ['/root/sleep', '2'], timeout_s=base.PATIENCE)
            return 'python' in self.sh(uuid, 'cat /root/seen || :')

        base.wait_for(seen, 'the program to be seen')
        # It was there, and could not be written.
        self.assertEqual('', self.sh(uuid, 'ls /root | grep over || :'))
        self.assertEqual(before, _digest(sys.executable))

    def test_nothing_of_the_host_is_open_in_the_guest(self):
        """CVE-2024-21626: a descriptor or a directory that was left open."""
        uuid = self.run_container()
        # Its init reads its files before.
        self.wait_started(uuid)
        self.background(uuid, 'true')
        thread_seen = []
        done = self.host.exec(uuid, ['/bin/sh', '-c', """
            readlink /proc/self/cwd
            for fd in /proc/self/fd/*; do echo $fd $(readlink $fd); done
            """])
        lines = done.stdout.decode().split('\n')
        self.assertEqual('/', lines[0])
        for line in lines[1:]:
            thread_seen += line.split()[1:2]
        for target in thread_seen:
            self.assertTrue(
                target.startswith(('pipe:', 'socket:', '/dev/null', '/proc/')),
                target)
        init = f'/proc/{self.pid(uuid)}'
        inside = {line.split()[0] for line in pathlib.Path(
            init, 'mountinfo').read_text().splitlines()}
        for fd in os.listdir(f'{init}/fd'):
            target = os.readlink(f'{init}/fd/{fd}')
            if target.startswith('/'):
                info = pathlib.Path(init, 'fdinfo', fd).read_text()
                mount = info.split('mnt_id:')[1].split()[0]
                self.assertIn(mount, inside, target)
        self.assertTrue(os.path.samestat(
            os.stat(f'{init}/cwd'), os.stat(f'{init}/root')))

    def test_links_in_place_of_directories(self):
        """CVE-2021-30465, CVE-2026-41579, CVE-2026-47766: mounts that are led
        out of the root, here by what the guest has left for its next start.
        """
        outside = self.config.state_dir / 'outside'
        outside.mkdir(mode=0o777)
        (outside / 'null').write_text('of the host')
        for number, target in enumerate((
                str(outside), '/../../../../../../../..' + str(outside),
                '/proc/self/root' + str(outside))):
            for name in ('dev', 'proc', 'sys', 'run'):
                with self.subTest(target=target, name=name):
                    uuid = self.run_container()
                    # Or its script writes to what the mount has covered.
                    self.wait_started(uuid)
                    self.sh(uuid, f'umount -l /{name} || :')
                    self.host.kill(uuid)
                    # The image's directory, in place of which a link is.
                    upper = self.host.entry(uuid).container.disk
                    upper.mount()
                    place = upper.upper / name
                    if place.is_dir():
                        place.rmdir()
                    place.symlink_to(target)
                    upper.unmount()
                    try:
                        self.host.prepare(uuid)
                        self.host.start_container(uuid)
                    except errors.ContainerError as e:
                        self.assertEqual('oci_failed', e.code, e)
                    self.assertEqual(['null'], os.listdir(outside), number)
                    self.assertEqual(
                        'of the host', (outside / 'null').read_text())
                    self.assertNotIn(str(outside), pathlib.Path(
                        '/proc/self/mountinfo').read_text())
                    self.host.delete(uuid)
        self.assertEqual([], self.host.list())

    def test_masks_by_devices_of_its_own(self):
        """CVE-2025-31133, CVE-2025-52565: what hides parts of /proc, and the
        console, are devices; the guest has left links in place of them.
        """
        uuid = self.run_container()
        self.wait_started(uuid)
        masks = self._masks(uuid)
        self.assertIn('/proc/keys', masks)
        self.assertIn('/proc/bus', masks)
        self.sh(uuid, 'umount -l /dev; cd /dev; '
                'for d in null console ptmx; do rm -f $d; '
                'ln -s /proc/sys/kernel/hostname $d; done; '
                'rm -rf pts; ln -s /proc/sys pts')
        self.host.kill(uuid)
        self.host.prepare(uuid)
        self.host.start_container(uuid)
        self.wait_started(uuid)
        self.assertEqual(masks, self._masks(uuid))
        self.assertEqual('0', self.sh(uuid, 'head -c1 /proc/keys | wc -c'))
        self.assertEqual('test', self.sh(uuid, 'hostname'))

    def _masks(self, uuid):
        """Mount points below /proc, with what is mounted there, and how."""
        found = {}
        for line in self.sh(uuid, 'cat /proc/self/mountinfo').splitlines():
            root, point, options = line.split()[3:6]
            kind = line.split(' - ')[1].split()[0]
            if point.startswith('/proc/'):
                found[point] = (root, options, kind)
        return found

    def test_proc_of_the_guests_own_making(self):
        """CVE-2019-16884, CVE-2025-52881: paths of /proc that lead the
        runtime's writes elsewhere.
        """
        uuid = self.run_container()
        ping_range = pathlib.Path(
            '/proc/sys/net/ipv4/ping_group_range').read_text()
        self.sh(uuid, """
            mkdir -p /fake/self/attr /fake/self/fd /fake/1/ns
            mkdir -p /fake/sys/net/ipv4 /fake/thread-self/attr
            for f in self/attr/exec self/attr/current self/oom_score_adj \\
                     self/setgroups self/uid_map sys/net/ipv4/x 1/ns/mnt; do
              ln -s /dev/console /fake/$f
            done
            mount --bind /fake /proc
            """)
        done = self.host.exec(uuid, ['/bin/sh', '-c', 'id -u; ls /proc/self'])
        self.assertEqual(0, done.exit_code, done.stderr)
        self.assertEqual('0', done.stdout.decode().split()[0])
        info = self.host.info(uuid)
        self.assertEqual('running', info['state'])
        self.assertGreater(info['pids'], 0)
        self.host.pause(uuid)
        self.host.unpause(uuid)
        self.host.reboot(uuid, 10)
        self.assertEqual(ping_range, pathlib.Path(
            '/proc/sys/net/ipv4/ping_group_range').read_text())
        # The mount was of that run.
        self.assertEqual('0', self.sh(uuid, 'cat /proc/self/oom_score_adj'))

    def test_rights_of_a_command(self):
        """CVE-2022-27650, CVE-2022-24769: a program of the image's has rights
        that count for whoever inherits them. Where the runtime gives them on,
        it gives any user of the guest root's.
        """
        uuid = self.run_container()
        self.wait_started(uuid)
        self.sh(uuid, """
            mkdir /tools; cp /bin/busybox /tools/cat
            umask 077; echo secret > /root/secret
            mkdir -m 777 /said
            """)
        # As "setcap cap_dac_override+ei /tools/cat" does in the guest.
        os.setxattr(
            f'/proc/{self.pid(uuid)}/root/tools/cat', 'security.capability',
            struct.pack(
                '<6I', _CAP_REVISION_3 | _CAP_EFFECTIVE, 0, _DAC_OVERRIDE,
                0, 0, self.host.info(uuid)['base_id']))
        steal = ('su -s /bin/sh nobody -c "/tools/cat /root/secret '
                 '> /said/{0} 2>/said/{0}.error"')
        # By a command, and by the init.
        self.sh(uuid, f'{steal.format("command")} || :')
        script = steal.format('init') + '; exec sleep 9999'
        self.sh(uuid, f"""
            printf '#!/bin/sh\n%s\n' '{script}' > /steal; chmod +x /steal
            echo '::respawn:/steal' >> /etc/inittab; kill -HUP 1
            """)
        for who in ('command', 'init'):
            refused = base.wait_for(
                lambda who=who: self.sh(
                    uuid, f'cat /said/{who} /said/{who}.error || :'),
                f'the attempt of the {who}')
            self.assertIn('Permission denied', refused)
        # Nor do both differ in what they may do.
        own, init = (dict(
            line.split(':\t', 1) for line in self.sh(
                uuid, f'cat /proc/{pid}/status').splitlines()
            if ':\t' in line) for pid in ('self', '1'))
        for status in (own, init):
            for name in ('CapInh', 'CapAmb'):
                self.assertEqual(0, int(status[name], 16), name)
            self.assertEqual('2', status['Seccomp'])
        for name in ('CapBnd', 'Seccomp_filters'):
            self.assertEqual(init[name], own[name], name)

    def test_trace_of_a_command(self):
        """CVE-2016-9962: the runtime is looked at while it enters."""
        uuid = self.run_container()
        for _ in range(2):
            self.background(uuid, """
                while :; do for d in /proc/[0-9]*; do
                  read comm < $d/comm; case $comm in (python*)
                    echo $comm >> /root/seen
                    # It may have become the command meanwhile.
                    case $(readlink $d/exe; cat $d/maps) in (*python*)
                      touch /root/looked;;
                    esac;;
                  esac
                done; done 2>/dev/null""")
        for _ in range(100):
            self.host.exec(uuid, ['/bin/true'])
            seen = self.sh(uuid, 'cat /root/seen 2>/dev/null || :')
            if seen:
                break
        self.assertIn('python', seen)
        self.assertEqual('', self.sh(uuid, 'ls /root | grep looked || :'))

    def test_another_root(self):
        """Its root is elsewhere: the runtime's verbs do what they did."""
        uuid = self.run_container()
        self.sh(uuid, """
            mkdir -p /new/bin /new/old /new/proc
            cp /bin/busybox /new/bin/sh
            mount --bind /new /new; cd /new
            pivot_root . old; exec chroot . /bin/sh -c 'echo moved'
            """)
        self.assertEqual('running', self.host.info(uuid)['state'])
        self.host.kill(uuid)
        self.host.delete(uuid)
        self.assertEqual([], self.traces(uuid))

    def test_flood_of_the_console(self):
        uuid, quiet = self.run_container(), self.run_container()
        self.sh(uuid, 'i=0; while [ $i -lt 64 ]; do '
                'dd if=/dev/zero bs=65536 count=16 2>/dev/null | '
                'tr "\\0" x; i=$((i + 1)); done > /dev/console',
                timeout_s=120)
        self.sh(uuid, 'echo the last words > /dev/console')
        end = time.monotonic() + base.PATIENCE
        while b'the last words' not in self.host.console_log(uuid, 1000):
            self.assertLess(time.monotonic(), end)
            time.sleep(0.1)
        kept = sum(
            path.stat().st_size for path in
            (self.config.instances_dir / uuid).glob('console.log*'))
        self.assertLessEqual(kept, 3 * self.config.console_log_bytes)
        self.sh(quiet, 'echo heard > /dev/console')
        while b'heard' not in self.host.console_log(quiet):
            self.assertLess(time.monotonic(), end)
            time.sleep(0.1)
