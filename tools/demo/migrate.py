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

"""Live-migrates a server there and back under load, and says what it saw.

    migrate.py SERVER ADDRESS RESULTS MOVES

An echo service has to answer at port 7 of ADDRESS. The credentials of an
administrator come from the environment; the moves are made by the openstack
command. RESULTS gets a list, one object for each move.
"""

import json
import pathlib
import subprocess
import sys
import time

import openstack
import prettytable

from tests import echo
from tests import ping as pings
from tests import progress


def move(compute, server_id, stream, ping):
    admin = compute.get_server(server_id)
    source = admin.compute_host
    stream.reset()
    ping.reset()
    command = ['openstack', 'server', 'migrate', '--live-migration', '--wait',
               server_id]
    print('\n$', *command, flush=True)
    began = time.monotonic()
    subprocess.run(command, check=True, timeout=600)
    total = time.monotonic() - began
    server = compute.get_server(server_id)
    if server.status != 'ACTIVE' or server.compute_host == source:
        raise SystemExit(
            f'the server is {server.status} on {server.compute_host}, where '
            f'it was: {server.fault or "no fault is given"}')
    # A silence that is not over yet is one, too.
    received, replies = stream.received, ping.replies
    deadline = time.monotonic() + 30
    while stream.received < received + 20 or ping.replies < replies + 20:
        if time.monotonic() > deadline or stream.error:
            raise SystemExit(f'no answer after the move: {stream.error!r}')
        time.sleep(0.05)
    migrations = [
        m for m in compute.migrations(instance_uuid=server_id)
        if m.migration_type == 'live-migration']
    newest = max(migrations, key=lambda m: m.id)
    if newest.status != 'completed':
        raise SystemExit(f'the migration is {newest.status}')
    status = progress.of(source, newest.uuid)
    return {
        'from': source, 'to': server.compute_host,
        'strategy': status['strategy'],
        'total_s': round(total, 2),
        'runtime_s': round(status['ended_at'] - status['began_at'], 2),
        'freeze_ms': round(status['frozen'] * 1000),
        'blackout_ms': round(ping.longest * 1000),
        'stream_gap_ms': round(stream.longest * 1000),
        'bytes': status['memory_sent'] + status['disk_sent'],
        'stream_intact': True,
    }


def main(argv):
    name, address, results, moves = argv[1:5]
    compute = openstack.connect(compute_default_microversion='2.90').compute
    server = compute.find_server(
        name, ignore_missing=False, all_projects=True)
    stream, ping = echo.Echo(address), pings.Ping(address)
    moved = [move(compute, server.id, stream, ping)
             for _ in range(int(moves))]
    ping.finish()
    # Raises if a byte was lost, repeated or changed.
    stream.finish()
    pathlib.Path(results).write_text(json.dumps(moved, indent=1))
    table = prettytable.PrettyTable(
        ['move', 'strategy', 'total s', 'runtime s', 'freeze ms',
         'blackout ms', 'TCP gap ms', 'MiB'])
    table.align = 'r'
    for m in moved:
        table.add_row([
            f'{m["from"]} to {m["to"]}', m['strategy'], m['total_s'],
            m['runtime_s'], m['freeze_ms'], m['blackout_ms'],
            m['stream_gap_ms'], f'{m["bytes"] / (1 << 20):.1f}'])
    print(f'\n{table}')
    print(f'the TCP stream is intact: {stream.received} lines came back, '
          'each once and in order')
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv))
