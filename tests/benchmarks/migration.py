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

"""Live migration of much memory, beside CRIU alone, by the runtime alone.

    python -m tests.benchmarks.migration [--memory MIB]... [--moves N]

Two hosts as namespaces of this machine, a guest with so much memory in use,
idle or writing to it all the time. It is moved to and fro by each strategy
under a ping every 5 ms. In the same run the same container is dumped by CRIU
to a tmpfs and restored from there, without any network: what a migration
cannot be quicker than. Nothing lies on a disk: the state directories are in
memory, too.
"""

import re
import statistics
import sys
import time
import typing as ty

from tests.benchmarks import common
from tests import ping
from tests.runtime import base
from tests.runtime import hosts

_ADDRESS = '203.0.113.10'
#: Fills its memory with what cannot be compressed, then writes to one page
#: after the other, a quarter of a second's worth of work in each second.
_GUEST = '''
import os, sys, time
size, rate = int(sys.argv[1]) << 20, int(sys.argv[2]) << 20
memory = bytearray()
while len(memory) < size:
    memory += os.urandom(16 << 20)
open('/run/ready', 'w').close()
position = 0
while True:
    if not rate:
        time.sleep(3600)
    end = time.monotonic() + 0.01
    for _ in range(rate // 4096 // 100):
        position = (position + 4096) % size
        memory[position] = position >> 12 & 255
    time.sleep(max(0, end - time.monotonic()))
'''


class _Hosts(hosts.TwoHostsTestCase):
    """The two hosts of the runtime's tests, with their state in memory."""

    agent_options: ty.ClassVar = {'disk_limit': 'none'}

    def runTest(self) -> None:
        """Nothing: it is used as what makes the hosts."""

    def _host(self, name: str, address: str) -> hosts.Agent:
        host = super()._host(name, address)
        state = host.directory / 'state'
        host.run('mount', '-t', 'tmpfs', '-o', 'mode=0711', 'state',
                 str(state))
        host.run('ln', '-s', str(base.WORK / 'test-layers'),
                 str(state / 'layers'))
        return host


class _Guest:
    """One guest on the first of the hosts."""

    def __init__(self, case: _Hosts, mib: int, rate: int) -> None:
        self._case = case
        self.here, self.there = case.a, case.b
        self.uuid = case.run_container(
            'debian13', memory=mib + 256, init={'argv': [
                '/usr/bin/python3', '-c', _GUEST, str(mib), str(rate)]},
            address=_ADDRESS)
        base.wait_for(
            lambda: self.here.exec(
                self.uuid, ['test', '-e', '/run/ready'])['exit_code'] == 0,
            'the guest to have its memory', 300)

    def bare(self) -> tuple[float, float]:
        """Seconds that CRIU takes for a dump to tmpfs, and for the restore.
        """
        self.here.suspend(self.uuid)
        self.here.resume(self.uuid)
        self._case.attach(self.here, self.uuid)
        text = self.here.log.read_text()
        return tuple(float(re.findall(
            rf'{self.uuid}: criu {what} it in ([0-9.]+) s', text)[-1])
            for what in ('dumped', 'restored'))

    def move(self, pings: ping.Ping, strategy: str) -> dict[str, ty.Any]:
        pings.reset()
        began = time.monotonic()
        source, destination = self._case.migrate(
            self.uuid, self.here, self.there, strategy=strategy,
            permit_post_copy=strategy == 'post-copy')
        total = time.monotonic() - began
        self.here, self.there = self.there, self.here
        seen = pings.replies
        base.wait_for(lambda: pings.replies > seen, 'an answer')
        return {'blackout_s': pings.reset(), 'freeze_s': source['frozen'],
                'total_s': total, 'memory_s': source['steps'].get('memory'),
                'bytes': source['memory_sent'],
                'source_steps': source['steps'],
                'destination_steps': destination['steps']}


def _median(moves: list[dict[str, ty.Any]], name: str) -> float:
    return statistics.median(move[name] for move in moves)


def _measure(case: _Hosts, mib: int, rate: int, moves: int
             ) -> list[dict[str, ty.Any]]:
    guest = _Guest(case, mib, rate)
    pings = ping.Ping(_ADDRESS)
    try:
        base.wait_for(lambda: pings.replies, 'an answer')
        bare = [guest.bare() for _ in range(moves)]
        # What CRIU alone takes, at this memory.
        dump = statistics.median(d for d, _ in bare)
        restore = statistics.median(r for _, r in bare)
        found = []
        for strategy in 'stop-and-copy', 'post-copy':
            moved = [guest.move(pings, strategy) for _ in range(moves)]
            row = {'memory_mib': mib, 'dirtying_mib_s': rate,
                   'strategy': strategy, 'criu_dump_s': dump,
                   'criu_restore_s': restore, 'moves': moved,
                   **{name: _median(moved, name) for name in (
                       'blackout_s', 'freeze_s', 'total_s', 'bytes')}}
            row['added_s'] = row['blackout_s'] - dump - restore
            if strategy == 'stop-and-copy':
                row['rate_ratio'] = dump / _median(moved, 'memory_s')
            found.append(row)
    finally:
        pings.finish()
    guest.here.delete(guest.uuid)
    return found


def _table(rows: list[dict[str, ty.Any]]) -> str:
    return common.table(
        ('memory MiB', 'dirtying MiB/s', 'strategy', 'CRIU dump ms',
         'CRIU restore ms', 'freeze ms', 'blackout ms', 'added ms',
         'total s', 'rate / CRIU\'s'),
        [(row['memory_mib'], row['dirtying_mib_s'], row['strategy'],
          *(round(row[name] * 1000) for name in (
              'criu_dump_s', 'criu_restore_s', 'freeze_s', 'blackout_s',
              'added_s')),
          f'{row["total_s"]:.2f}',
          f'{row["rate_ratio"]:.2f}' if 'rate_ratio' in row else '')
         for row in rows])


def main() -> int:
    parser = common.parser(__doc__)
    parser.add_argument(
        '--memory', type=int, action='append', metavar='MIB',
        help='memory that the guest uses; repeatable (64, 512, 2048)')
    parser.add_argument('--moves', type=int, default=4,
                        help='by each strategy (%(default)s)')
    parser.add_argument('--rate', type=int, default=100, metavar='MIB',
                        help='written in a second by the busy guest '
                        '(%(default)s)')
    arguments = parser.parse_args()
    common.image('debian13')
    common.inside_host()
    memory = arguments.memory or [64, 512, 2048]
    print(common.describe_machine(), flush=True)
    case = _Hosts()
    rows = []
    try:
        case.setUp()
        for mib in memory:
            for rate in 0, arguments.rate:
                rows += _measure(case, mib, rate, arguments.moves)
                print(f'{mib} MiB, {rate} MiB/s: done', flush=True)
    finally:
        case.doCleanups()
    print(_table(rows))
    print('Aims: at most 150 ms added by stop-and-copy; a rate of at least '
          '0.70; and with post-copy')
    found = {(row['memory_mib'], row['dirtying_mib_s']): row['blackout_s']
             for row in rows if row['strategy'] == 'post-copy'}
    for rate in 0, arguments.rate:
        ratio = found[memory[-1], rate] / found[memory[0], rate]
        print(f'the blackout of {memory[-1]} MiB to that of {memory[0]} MiB '
              f'({rate} MiB/s): {ratio:.2f}, aim 1.3')
    common.write_json(arguments.json, {'rows': rows})
    return 0


if __name__ == '__main__':
    sys.exit(main())
