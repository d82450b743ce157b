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

"""Guests that make it hard to move them, or to do anything with them."""

import pathlib
import time

from nova_pycontainer.runtime import errors
from tests import echo
from tests.runtime import base
from tests.runtime import hosts

#: Of each of some processes: all that a host without CAP_SYS_RESOURCE permits.
_DESCRIPTORS, _PROCESSES = 12_500, 4

_OPEN = f'''
import os, resource, time
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
for which in range(1, {_PROCESSES}):
    if os.fork() == 0:
        break
else:
    which = 0
for number in range({_DESCRIPTORS}):
    os.open("/etc/passwd", os.O_RDONLY)
last = os.open(f"/root/last{{which}}", os.O_CREAT | os.O_RDWR)
os.write(last, b"0123456789")
open(f"/run/all{{which}}", "w").close()
while not os.path.exists("/root/go"):
    time.sleep(0.1)
os.write(last, b"and on")
with open(f"/run/{{which}}", "w") as f:
    f.write(str(len(os.listdir("/proc/self/fd"))) + "\\n")
os.rename(f"/run/{{which}}", f"/run/count{{which}}")
time.sleep(100000)
'''

#: As QEMU, and this driver, announce a guest; also as somebody else.
_RARP = '''
import socket, struct, time
address = open("/sys/class/net/eth0/address").read()
mine = bytes.fromhex(address.replace(":", ""))
sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
sock.bind(("eth0", 0))
while True:
    for mac in (mine, bytes.fromhex("fa163e00dead")):
        sock.send((b"\\xff" * 6 + mac + struct.pack(
            "!HHHBBH", 0x8035, 1, 0x0800, 6, 4, 3) + (mac + bytes(4)) * 2
        ).ljust(60, b"\\0"))
    time.sleep(0.0005)
'''

#: Each process makes two, whatever becomes of them.
_FORKS = '''
f() { while :; do (f) & (f) & wait; done; }
f
'''


def _all(text):
    counts = [int(line) for line in text.split()]
    return counts if len(counts) == _PROCESSES else None


class HostileMovesTestCase(hosts.TwoHostsTestCase):

    def _background(self, uuid, script):
        self.sh(self.a, uuid, "cat > /root/attack <<'EOF'\n" + script +
                '\nEOF\nsetsid sh /root/attack </dev/null >/dev/null 2>&1 &')

    def _python(self, uuid, name, script):
        self.sh(self.a, uuid, f"cat > /root/{name} <<'EOF'\n{script}\nEOF\n"
                f'setsid python3 /root/{name} </dev/null '
                f'>/root/{name}.log 2>&1 &')

    def _sleeper(self, **kwargs):
        return self.run_container(
            'debian13', init={'argv': ['/bin/sleep', '100000']}, **kwargs)

    def _check_goes_on(self, stream):
        received = stream.received
        base.wait_for(lambda: stream.received > received + 100 or
                      stream.error, 'the stream to go on')
        self.assertIsNone(stream.error)

    def test_descriptors(self):
        """One process holds more of them than any file table begins with."""
        uuid = self._sleeper()
        self._python(uuid, 'descriptors', _OPEN)
        base.wait_for(lambda: len(self.sh(
            self.a, uuid, 'ls /run').split('all')) > _PROCESSES, 'all of them')
        self.migrate(uuid, self.a, self.b)
        self.sh(self.b, uuid, 'touch /root/go')
        counts = base.wait_for(lambda: _all(self.sh(
            self.b, uuid, 'cat /run/count* 2>/dev/null || :')), 'the counts')
        self.assertGreater(min(counts), _DESCRIPTORS)
        # Each goes on where it was.
        self.assertEqual('0123456789and on',
                         self.sh(self.b, uuid, 'cat /root/last1'))

    def test_announcements_of_its_own(self):
        """It says that it is here, and others are, while it is moved, and
        while a move fails.
        """
        uuid = self._sleeper(address='203.0.113.10')
        self._python(uuid, 'echo', echo.SERVICE)
        stream = echo.Echo('203.0.113.10')
        self._python(uuid, 'rarp', _RARP)
        base.wait_for(lambda: self.sh(
            self.a, uuid, 'grep -l rarp /proc/[0-9]*/cmdline || :'), 'it')
        self.b.restart_agent('destination.restored=raise')
        self.assertRaises(
            AssertionError, self.migrate, uuid, self.a, self.b)
        self._check_goes_on(stream)
        self.b.delete(uuid)
        self.b.restart_agent()
        self.migrate(uuid, self.a, self.b)
        self._check_goes_on(stream)
        stream.finish()

    def test_forks_without_end(self):
        """Nothing of its host's is used up, and it can be governed."""
        uuid, quiet = self.run_container(), self.run_container()
        self._background(uuid, _FORKS)
        base.wait_for(lambda: self.a.info(uuid)['pids'] > 400, 'its forks')
        self.assertLessEqual(self.a.info(uuid)['pids'], 512)
        # A command finds no room in it, and says so; another's does.
        try:
            done = self.a.exec(uuid, ['/bin/true'], timeout_s=base.PATIENCE)
            self.assertIn('exit_code', done)
        except errors.ContainerError as e:
            self.assertNotEqual('timeout', e.code)
        self.assertEqual('x', self.sh(self.a, quiet, 'echo x'))
        self.a.pause(uuid)
        group = pathlib.Path(f'/proc/{self.a.info(uuid)["pid"]}/stat')
        before = group.read_text()
        time.sleep(0.5)
        self.assertEqual(before, group.read_text())
        self.a.unpause(uuid)
        # It changes under CRIU's hands, and moves or stays; in either case
        # there is one of it.
        try:
            self.migrate(uuid, self.a, self.b)
            here, there = self.b, self.a
        except (AssertionError, errors.ContainerError):
            here, there = self.a, self.b
            there.delete(uuid)
        self.assertEqual('running', here.info(uuid)['state'])
        self.assertNotIn(uuid, [each['uuid'] for each in there.list()])
        here.kill(uuid)
        here.delete(uuid)
        self.assertEqual('x', self.sh(self.a, quiet, 'echo x'))
