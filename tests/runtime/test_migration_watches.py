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

"""Guests whose watched files the kernel has dropped from its caches."""

import pathlib
import subprocess

from tests.runtime import base
from tests.runtime import hosts

#: A watch on a file of the image, one on a file of the guest's own.
PROGRAM = '''
import ctypes, os, time
libc = ctypes.CDLL(None)
fd = libc.inotify_init()
for path in b"/usr/share/common-licenses", b"/root/watched":
    assert libc.inotify_add_watch(fd, path, 0x106) > 0
open("/root/ready", "w").close()
while True:
    event = os.read(fd, 4096)
    with open("/root/events", "a") as f:
        f.write(f"{len(event)}\\\\n")
'''


class WatchTestCase(hosts.TwoHostsTestCase):

    def test_dropped_caches(self):
        self.dhcp()
        uuid = self.run_container('debian13', memory=512, nics=[{
            'id': '0123456789c-x', 'devname': 'tap0123456789c',
            'mac': 'fa:16:3e:00:00:34', 'mtu': 1500, 'tx_offload': True}])
        base.wait_for(
            lambda: self.sh(self.a, uuid, 'systemctl is-system-running || :')
            in ('running', 'degraded'), 'systemd', 240)
        self.sh(self.a, uuid, f'mkdir /root/watched; cat > /root/w.py <<END'
                f'{PROGRAM}END\nsystemd-run -q --unit=watch python3 '
                '/root/w.py')
        base.wait_for(lambda: self.sh(
            self.a, uuid, 'ls /root/ready || :'), 'the watches')
        here, there = self.a, self.b
        for move in range(2):
            subprocess.run(['sync'], check=True, timeout=60)
            pathlib.Path('/proc/sys/vm/drop_caches').write_text('2')
            source, _ = self.migrate(uuid, here, there)
            print(source['steps'])
            # For a message that was not read yet it may have been tried
            # again.
            self.assertNotIn('inotify', here.log.read_text())
            here, there = there, here
            self.sh(here, uuid, ': > /root/events; '
                    f'echo > /root/watched/file{move}')
            base.wait_for(
                lambda host=here: self.sh(host, uuid, 'cat /root/events'),
                'the event')
            # systemd watches its units' cgroups in this way.
            self.sh(here, uuid, 'systemctl restart systemd-networkd && '
                    'systemctl is-active systemd-networkd')
