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

"""Prints the demo's table of timings, and writes them as JSON.

    report.py RESULTS DENSITY-JSON MIGRATIONS-JSON [JSON-PATH]

RESULTS has lines of a key and a number. Times are seconds, sizes bytes.
DENSITY-JSON is what tests.benchmarks.density wrote, MIGRATIONS-JSON what
migrate.py did.
"""

import json
import os
import pathlib
import platform
import statistics
import sys

import prettytable

TITLES = {
    'install_s': 'installing packages, virtual environment, CRIU',
    'cloud_up_s': 'cloud up',
    'image_build_s': 'image built',
    'image_upload_s': 'image uploaded',
    'create_command_s': '"openstack server create" returns',
    'create_to_active_s': 'server create to ACTIVE (with the command)',
    'active_to_ssh_s': 'ACTIVE to a login over ssh',
    'migration_total_median_s': 'live migration, the whole command (median)',
    'migration_freeze_median_s': 'live migration, guest frozen (median)',
    'migration_blackout_median_s':
        'live migration, longest silence of a 5 ms ping (median)',
    'delete_s': 'server delete to gone (with the command)',
    'instance_anonymous_bytes': "guest: its processes' memory",
    'instance_page_cache_bytes': 'guest: page cache (reclaimable)',
    'instance_kernel_bytes': 'guest: kernel memory for it',
    'instance_overhead_bytes': 'idle instance: what the driver adds to that',
}


def main(argv):
    results = {}
    for line in pathlib.Path(argv[1]).read_text().splitlines():
        key, _, value = line.partition(' ')
        results[key] = int(value) if key.endswith('_bytes') else float(value)
    density = json.loads(pathlib.Path(argv[2]).read_text())['density'][0]
    results['instance_overhead_bytes'] = round(density['overhead_bytes'])
    migrations = json.loads(pathlib.Path(argv[3]).read_text())
    for key in ('total_s', 'freeze_ms', 'blackout_ms'):
        scale = 1000 if key.endswith('_ms') else 1
        results[f'migration_{key.split("_")[0]}_median_s'] = (
            statistics.median(m[key] for m in migrations) / scale)
    table = prettytable.PrettyTable(['what', 'seconds', 'MiB'])
    table.align = 'r'
    table.align['what'] = 'l'
    for key, title in TITLES.items():
        if key in results:
            value = results[key]
            table.add_row([title, '', f'{value / (1 << 20):.2f}']
                          if key.endswith('_bytes')
                          else [title, f'{value:.2f}', ''])
    print(table)
    results['migrations'] = migrations
    if len(argv) > 4 and argv[4]:
        results['machine'] = {
            'cpus': os.cpu_count(), 'kernel': platform.release(),
            'load': os.getloadavg()[0]}
        pathlib.Path(argv[4]).write_text(
            json.dumps(results, indent=2) + '\n')
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv))
