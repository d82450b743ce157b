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

"""File capabilities of images, as containers see them."""

import os
import pathlib
import re
import struct
import subprocess
import sys

from nova_pycontainer.runtime import idmap
from nova_pycontainer.runtime import overlay
from tests.runtime import layers_base
from tests import tarballs

BASE = layers_base.BASE
PATIENCE = layers_base.PATIENCE
PING = struct.pack('<5I', 0x02000001, 1 << 13, 0, 0, 0)  # CAP_NET_RAW, e
CAPABILITY = 'SCHILY.xattr.security.capability'

RUN_IN_USERNS = """
import os, sys
from nova_pycontainer.runtime import syscalls
syscalls.unshare(syscalls.CLONE_NEWUSER)
print('ready', flush=True)
sys.stdin.readline()
os.setresgid(1000, 1000, 1000)
os.setresuid(1000, 1000, 1000)
os.execv(sys.argv[1], [sys.argv[1], '/proc/self/status'])
"""


class TestFileCapabilities(layers_base.Case):
    """ping's case: a program with cap_net_raw, run by a plain user."""

    def effective(self, program, base):
        process = subprocess.Popen(
            [sys.executable, '-c', RUN_IN_USERNS, program],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            self.assertEqual('ready\n', process.stdout.readline())
            for name in ('uid_map', 'gid_map'):
                pathlib.Path(f'/proc/{process.pid}/{name}').write_text(
                    f'0 {base} 65536')
            out = process.communicate('\n', timeout=PATIENCE)[0]
            return int(re.search(r'CapEff:\s*(\w+)', out)[1], 16)
        finally:
            if process.poll() is None:
                process.kill()
                process.communicate()

    def test_it_counts_in_the_container_and_nowhere_else(self):
        cat = pathlib.Path('/bin/cat').read_bytes()
        three = struct.pack('<6I', 0x03000001, 1 << 13, 0, 0, 0, 100_000)
        root = self.load(
            tarballs.system()
            .add('ping', cat, mode=0o755, pax={
                CAPABILITY: PING.decode('utf-8', 'surrogateescape')})
            .add('of-a-container', cat, mode=0o755, pax={
                CAPABILITY: three.decode('utf-8', 'surrogateescape')})
            .add('plain', cat, mode=0o755).bytes()).root
        # On disk it is version 3 with root id 0, which the initial user
        # namespace sees as version 2.
        for name in ('ping', 'of-a-container'):
            self.assertEqual(
                PING, os.getxattr(root / name, 'security.capability'))
        ours, others = BASE + (1 << 16), BASE + (2 << 16)
        target = self.base / 'merged'
        for name in ('upper', 'work'):
            (self.base / name).mkdir()
        os.chown(self.base / 'upper', ours, ours)
        overlay.mount(
            target, layer=root, upper=self.base / 'upper',
            work=self.base / 'work', base_id=ours)
        self.addCleanup(overlay.unmount, target)
        # From outside, the container's mapping shows: version 3, and its
        # root.
        seen = os.getxattr(target / 'ping', 'security.capability')
        self.assertEqual((0x03000001, ours),
                         struct.unpack('<I16xI', seen))
        for name, base, want in (
            ('ping', ours, 1 << 13), ('of-a-container', ours, 1 << 13),
            ('plain', ours, 0), ('ping', others, 0),
        ):
            self.assertEqual(
                want, self.effective(str(target / name), base), (name, base))
        # A copy that the container made (copy-up) keeps it.
        os.utime(target / 'ping')
        self.assertTrue((self.base / 'upper/ping').exists())
        self.assertEqual(1 << 13, self.effective(str(target / 'ping'), ours))
        self.assertEqual(0, self.effective(str(target / 'ping'), others))

    def test_range_of_containers_is_another(self):
        allocator = idmap.IdAllocator(1 << 30, 16)
        self.assertEqual((1 << 30) + 16 * 65536, allocator.unpack_base)
