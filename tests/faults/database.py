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


"""A database in the guest: SQLite, with a log written ahead and synced.

Its client commits one numbered row after the other, and then says so in a
file that is read along on both hosts. In the end the database is whole, and
has every row that was ever said to be committed.
"""

import hashlib
import os
import pathlib
import subprocess
import tarfile
import tempfile

from tests.faults import kernel
from tests.faults import witness
from tests.runtime import base

_SOURCE = pathlib.Path(__file__).with_name('ledger.c')
_LOG = 'committed'
#: By it another process knows that somebody has mapped the file beside the
#: database (sqlite's os_unix.c: UNIX_SHM_DMS).
_IN_USE = ('READ', '128', '128')
START = (f'setsid sh -c "ledger run /database /{_LOG}; echo ended: \\$? >&2" '
         '</dev/null >/dev/null 2>/database.error &')

CHECK = 'ledger check /database'
#: As after the power was lost, of what is on the disk while its client stands
#: still: the client does not notice.
CHECK_A_COPY = '''
pid=$(pidof ledger); mkdir -p /copy; rm -f /copy/*
kill -STOP $pid
until grep -q '^State:.T' /proc/$pid/status; do :; done
cp /database /database-wal /copy/
kill -CONT $pid
ledger check /copy/database
'''


def image():
    """The root tarball of a busybox system with the program in it.

    :returns: its path; the name tells its contents
    """
    busybox = base.image('busybox')
    digest = hashlib.sha256(
        busybox.name.encode() + _SOURCE.read_bytes()).hexdigest()
    path = base.WORK / 'images' / f'busybox-ledger-{digest[:16]}.tar'
    if path.exists():
        return path
    with tempfile.TemporaryDirectory(dir=base.WORK) as name:
        program, made = pathlib.Path(name, 'ledger'), pathlib.Path(name, 'tar')
        subprocess.run(
            ['gcc', '-O2', '-Wall', '-static', '-s', '-o', program, _SOURCE,
             '-lsqlite3', '-lm', '-lpthread', '-ldl'], check=True,
            stderr=subprocess.DEVNULL, timeout=120)
        subprocess.run(['zstd', '-qdf', busybox, '-o', made], check=True,
                       timeout=120)
        with tarfile.open(made, 'a') as tar:
            tar.add(program, 'bin/ledger')
        # Several jobs may make it at once.
        os.replace(made, path)
    return path


class Database:
    """What is known of the one of a guest, on whichever host."""

    def __init__(self, hosts, uuid):
        self.uuid = uuid
        self._committed = witness.Witness(hosts, uuid, _LOG)
        self.moves = self._committed.moves
        self.last = self._committed.last
        self.close = self._committed.close

    def problems(self, name, ask, check=CHECK):
        """What is wrong with it.

        :param name: the host that it is on
        :param ask: runs a command in its guest, and returns the output
        :param check: that command
        """
        found = self._committed.problems(name)
        # First: what is committed after the look need not be in it.
        said = self._committed.lines(name)
        verdict, *rows = ask(check).splitlines()
        if verdict != 'ok':
            return [*found, f'the database is not whole: {verdict}']
        there = witness.parsed(rows)
        if [number for number, _ in there] != [*range(1, len(there) + 1)]:
            found.append('the rows of the database are not 1, 2, 3 …')
        lost = [*set(said) - set(there)]
        if lost:
            found.append(
                f'{len(lost)} rows were committed and are not in the '
                f'database, such as {min(lost)}')
        return found


class Guests:
    """A part of :class:`tests.faults.rig.Rig`: its guests have one."""

    @staticmethod
    def layer_key(name):
        return base.key_of(image()) if name == 'busybox' else (
            base.layer_key(name))

    def start_database(self, uuid):
        """On host a."""
        self.sh(self.a, uuid, START)
        self.database = Database((self.a, self.b), uuid)
        base.wait_for(lambda: self.database.last('a'),
                      'the database to have rows')

    def is_locked(self, host):
        """Whether another process in the guest may open it."""
        return kernel.Copy(host, self.database.uuid).holds(
            'ledger run', _IN_USE)

    def check_database(self, host, check=CHECK):
        """It is whole, and has lost nothing; the guest runs on the host."""
        uuid = self.database.uuid
        problems = self.database.problems(
            host.name, lambda command: self.sh(host, uuid, command), check)
        if problems:
            raise AssertionError('\n'.join(problems))

    def check_busy(self, host):
        """Both the counter and the database go on."""
        uuid = self.database.uuid
        if not self.witness.moves(host.name):
            raise AssertionError(f'the guest does nothing: {host.info(uuid)}')
        if not self.database.moves(host.name):
            error = self.sh(host, uuid, 'cat /database.error')
            raise AssertionError(
                f'the database stands still: {error!r}, '
                f'{kernel.Copy(host, uuid).doing("ledger run")}')
