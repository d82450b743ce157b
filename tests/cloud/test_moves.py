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

"""One server moves back and forth, many times, while all of it is in use.

PYCONTAINER_TEST_MOVES says how often; the figures of each move are appended
to ``moves.json`` among the logs.
"""

import json
import os
import statistics
import time
import typing

from testtools import content

from tests import cases
from tests.cloud import base
from tests.cloud import sessions
from tests import echo
from tests import ping
from tests import progress

_MOVES = int(os.environ.get('PYCONTAINER_TEST_MOVES', '2'))
_FIGURES = base.LOGS.parent / 'moves.json'

#: Commits rows one by one, each made of the one before: what was lost or
#: repeated breaks the chain.
_LOAD = '''\
import hashlib, sqlite3, time
base = sqlite3.connect("/var/lib/load.db", isolation_level=None)
base.execute("PRAGMA journal_mode = WAL")
base.execute("PRAGMA synchronous = FULL")
base.execute("CREATE TABLE chain (n INTEGER PRIMARY KEY, hash TEXT)")
n, last = 0, ""
while True:
    n += 1
    last = hashlib.sha256(f"{last}{n}".encode()).hexdigest()
    base.execute("INSERT INTO chain VALUES (?, ?)", (n, last))
    if n % 100 == 0:
        base.execute("UPDATE chain SET hash = hash WHERE n % 7 = 0 "
                     "AND n > ?", (n - 100,))
    time.sleep(0.002)
'''
_VERIFY = '''\
import hashlib, sqlite3
base = sqlite3.connect("/var/lib/load.db")
assert base.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
last = ""
for number, (n, found) in enumerate(
        base.execute("SELECT n, hash FROM chain ORDER BY n"), 1):
    last = hashlib.sha256(f"{last}{number}".encode()).hexdigest()
    assert (n, found) == (number, last), (n, number)
print(number)
'''
#: The same for a guest that has a shell only.
_SHELL_LOAD = '''
n=0
while :; do
    n=$((n + 1))
    echo $n >>/root/numbers
    sync -d /root/numbers 2>/dev/null || sync
    usleep 5000
done
'''


class MovesTest(base.CloudTestCase):

    def _write(self, server, path, text):
        """Put a file into a server whose user is debian."""
        base.run([*base.SSH, f'debian@{server.floating}',
                  f'sudo tee {path} >/dev/null'], stdin=text)

    def _debian(self, image):
        server = self.create_server(image, host='host1', name=f'moves-{image}')
        server.floating = self.floating_ip(server)
        self.wait_ssh(server.floating, user='debian')
        self.open_port(7)
        for name, text in (('echo', echo.SERVICE), ('load', _LOAD)):
            self._write(server, f'/root/{name}.py', text)
            self.ssh(server.floating, f'sudo systemd-run --unit test-{name} '
                     f'python3 /root/{name}.py', 'debian')
        # cloud-init may go on long after it has let us in.
        self.ssh(server.floating, 'cloud-init status --wait', 'debian', 120)
        return server

    def _two_ways(self, image):
        server = self._debian(image)
        session = sessions.Session(server.floating)
        self.addCleanup(session.finish)
        base.wait_for(session.come, 60, 'the session talks')
        self._moves(server, image, 7)
        session.come()
        base.wait_for(session.come, 60, 'the session still talks')
        self.assertEqual('', session.finish())

        def run(command):
            return self.ssh(server.floating, command, 'debian').strip()

        self.assertEqual('running', run('systemctl is-system-running'))
        run('sudo systemctl stop test-load')
        self._write(server, '/root/verify.py', _VERIFY)
        rows = int(run('sudo python3 /root/verify.py'))
        self.assertGreater(rows, 100 * _MOVES)
        run('sudo systemctl restart test-echo')
        self._assert_idle(server)
        return rows

    def _assert_idle(self, server):
        """No process spins: that would be at a whole processor, for ever."""
        def share():
            before = self.container(server)['cpu_time_ns']
            began = time.monotonic()
            time.sleep(5)
            used = self.container(server)['cpu_time_ns'] - before
            return used / 1e9 / (time.monotonic() - began)

        # What was just asked of it, it may still be at.
        base.wait_for(lambda: share() < 0.25, 60, 'the guest rests')

    def _moves(self, server: typing.Any, name: str, port: int) -> None:
        stream = echo.Echo(server.floating, port)
        pings = ping.Ping(server.floating)
        self.addCleanup(pings.finish)
        moved = []
        for number in range(_MOVES):
            stream.reset()
            pings.reset()
            source = self.host_of(server)
            began = time.monotonic()
            # As the command does it, which takes seconds to start.
            self.admin.compute.live_migrate_server(
                server.id, block_migration='auto')
            now = self.wait_server(server.id, 'ACTIVE')
            total = time.monotonic() - began
            self.assertNotEqual(source, now.compute_host, f'move {number}')
            self._wait_answers(stream, pings)
            self.assertIsNone(stream.error, f'move {number}')
            newest = base.wait_for(
                lambda: self._ended(server), 60, 'the end of the migration')
            self.assertEqual('completed', newest.status)
            status = progress.of(source, newest.uuid)
            moved.append({
                'image': name, 'from': source, 'to': now.compute_host,
                'strategy': status['strategy'], 'total_s': total,
                'runtime_s': status['ended_at'] - status['began_at'],
                'freeze_s': status['frozen'], 'blackout_s': pings.longest,
                'stream_gap_s': stream.longest,
                'bytes': status['memory_sent'] + status['disk_sent']})
        stream.finish()
        self._report(name, moved)

    def _ended(self, server):
        """The newest migration; the server is active a little sooner."""
        newest = max(self.admin.compute.migrations(
            instance_uuid=server.id), key=lambda m: m.id)
        return newest if newest.status in (
            'completed', 'failed', 'error', 'cancelled') else None

    def _wait_answers(self, stream, pings):
        """A silence that is not over yet is one, too."""
        received, replies = stream.received, pings.replies
        base.wait_for(
            lambda: stream.error or (stream.received > received + 20 and
                                     pings.replies > replies + 20),
            60, 'answers after a move')

    def _report(self, name, moved):
        with open(_FIGURES, 'a') as f:
            f.writelines(json.dumps(move) + '\n' for move in moved)
        lines = []
        for key in ('blackout_s', 'freeze_s', 'stream_gap_s', 'runtime_s',
                    'total_s'):
            values = sorted(move[key] for move in moved)
            last = min(len(values) - 1, int(len(values) * 0.99))
            lines.append(
                f'{key}: p50 {statistics.median(values):.3f} '
                f'p99 {values[last]:.3f} max {values[-1]:.3f}')
        text = f'{name}, {len(moved)} moves\n' + '\n'.join(lines)
        self.addDetail('moves', content.text_content(text))
        (_FIGURES.parent / f'moves-{name}.txt').write_text(text + '\n')

    def test_debian13(self):
        self._two_ways('debian13')

    @cases.more
    def test_debian12(self):
        self._two_ways('debian12')

    def test_busybox(self):
        server = self.create_server(
            'busybox', 'pyc.tiny', host='host1', name='moves-busybox')
        server.floating = self.floating_ip(server)
        # It has no sshd, and its group lets nobody in but there.
        self._start(server, 'nc -ll -p 22 -e /bin/cat')
        self._start(server, _SHELL_LOAD)
        self._moves(server, 'busybox', 22)
        numbers = self.inside(server, 'cat /root/numbers').split()
        self.assertGreater(len(numbers), 20 * _MOVES)
        self.assertEqual(
            [str(n) for n in range(1, len(numbers) + 1)], numbers)
        self.inside(server, 'kill $(cat /run/load*)')
        self._assert_idle(server)
        # The shell on its console has come with it.
        self.assertIn('-/bin/sh', self.inside(server, 'ps'))

    def _start(self, server, script):
        self.inside(server, f'''
cat >/root/run.sh <<'END'
echo $$ >/run/load$$
{script}
END
setsid sh /root/run.sh </dev/null >/dev/null 2>&1 &
sleep 0.3''')
