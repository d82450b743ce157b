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


"""A guest that writes down that it runs, and who reads along.

Each line that it writes has a number and a random one of the kernel's. Two
copies that ran, even one after the other, would write different lines with
the same number; a copy that lost something would leave a gap.
"""

import pathlib
import re
import threading
import time

COUNT = (
    'setsid sh -c "exec 3>>/ticks; i=0; while :; do i=\\$((i+1)); '
    'read u </proc/sys/kernel/random/uuid; echo \\$i \\$u >&3; '
    'usleep 50000; done" </dev/null >/dev/null 2>&1 &')
#: Also an echo service, whose connections are a part of the guest, and a
#: process with some memory, that post-copy takes a while for.
START = (
    f'{COUNT} setsid nc -ll -p 7 -e /bin/cat </dev/null >/dev/null 2>&1 & '
    "setsid awk 'BEGIN { s = sprintf(\"%6000000s\", \"x\"); "
    'for (;;) system("sleep 1000"); print length(s) }\' '
    '</dev/null >/dev/null 2>&1 &')

_LINE = re.compile(r'(\d+) ([0-9a-f-]{36})')
_PERIOD = 0.05


def parsed(lines):
    """(number, text) of each."""
    return [(int(m[1]), m[2]) for line in lines
            if (m := _LINE.fullmatch(line))]


class Witness:
    """Reads the lines on both hosts all the while.

    :param name: of the file, in the guest's root
    """

    def __init__(self, hosts, uuid, name='ticks'):
        self._hosts = {host.name: host for host in hosts}
        self._uuid = uuid
        self._file = name
        #: host → lines that it has had at any time.
        self._seen = {name: {} for name in self._hosts}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        while not self._stop.wait(_PERIOD):
            for name in self._hosts:
                lines = self.lines(name)
                with self._lock:
                    for number, text in lines:
                        self._seen[name].setdefault(number, set()).add(text)

    def lines(self, name):
        """What a host has now: (number, text) each."""
        # The upper directory, which no guest can hide. A host that has lost
        # its power has another pid then.
        host = self._hosts[name]
        try:
            data = pathlib.Path(host.instances, self._uuid,
                                'disk/upper', self._file).read_bytes()
        except OSError:
            return []
        # A line that is being copied or written is not one yet.
        whole = data[:data.rfind(b'\n') + 1].decode('ascii', 'replace')
        return parsed(whole.splitlines())

    def last(self, name):
        lines = self.lines(name)
        return lines[-1][0] if lines else 0

    @staticmethod
    def is_alive(copy):
        """Whether all that counts and echoes is there.

        :param copy: a kernel.Copy
        """
        commands = copy.commands()
        return (any('>>/ticks' in c for c in commands) and
                any(c.startswith('nc -ll -p 7') for c in commands) and
                any(c.startswith('ledger run') for c in commands) and
                '/bin/cat' in commands)

    def moves(self, name, timeout=20.0):
        """Whether the guest goes on writing there."""
        before = self.last(name)
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self.last(name) > before:
                return True
            time.sleep(0.05)
        return False

    def problems(self, name):
        """What is wrong with the lines of the copy that is left.

        :param name: the host that it is on
        """
        # First: what is seen after the copy is read need not be in it.
        with self._lock:
            all_seen = {host: {number: set(texts)
                               for number, texts in seen.items()}
                        for host, seen in self._seen.items()}
        kept = self.lines(name)
        found = []
        numbers = [number for number, _ in kept]
        if numbers != list(range(1, len(numbers) + 1)):
            gaps = [n for n, want in zip(numbers, range(1, len(numbers) + 1))
                    if n != want][:3]
            found.append(f'the lines of /{self._file} are not 1, 2, 3 …: '
                         f'{gaps}')
        texts = dict(kept)
        for host, seen in all_seen.items():
            for number, variants in seen.items():
                for text in variants:
                    if texts.get(number) != text:
                        found.append(
                            f'line {number} of /{self._file} was {text} on '
                            f'host {host}, and is '
                            f'{texts.get(number)} now: it ran twice, or '
                            'something is lost')
        return found[:5]

    def close(self):
        self._stop.set()
        self._thread.join()
