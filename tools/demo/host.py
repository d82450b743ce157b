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

"""What a compute host sees of an instance.

Runs there, as root, with the clone in PYTHONPATH.

    host.py INSTANCE-UUID RESULTS

Appends what the instance's memory consists of to RESULTS, for report.py.
"""

import json
import pathlib
import subprocess
import sys

import prettytable

from tests.benchmarks import common

MIB = 1 << 20


def _limit(cgroup, controller, v2, v1):
    """A limit, from the hierarchy that has its controller on this machine."""
    for path in (pathlib.Path('/sys/fs/cgroup') / cgroup / v2,
                 pathlib.Path('/run/cgroup1') / controller / cgroup / v1):
        if path.exists():
            return path.read_text().strip()
    return None


def _cpu_limit(cgroup):
    found = _limit(cgroup, 'cpu', 'cpu.max', '-')
    if found is None:
        quota = _limit(cgroup, 'cpu', '-', 'cpu.cfs_quota_us')
        period = _limit(cgroup, 'cpu', '-', 'cpu.cfs_period_us')
    else:
        quota, period = found.split()
    if quota in (None, 'max', '-1'):
        return 'none'
    return f'{int(quota) / int(period):g} CPUs'


def main(argv):
    uuid, results = argv[1:]
    shown = subprocess.run(
        ['pycontainer', 'show', uuid, '-f', 'json'], check=True,
        stdout=subprocess.PIPE, timeout=60)
    info = json.loads(shown.stdout)
    pid = info['pid']
    cgroup = next(
        line.split('::', 1)[1].strip() for line in
        pathlib.Path(f'/proc/{pid}/cgroup').read_text().splitlines()
        if line.startswith('0::')).lstrip('/')
    # systemd's init lives in a group below the container's.
    cgroup = cgroup[:cgroup.index(uuid) + len(uuid)]
    memory = common.guest_memory(cgroup)
    limit = int(_limit(cgroup, 'memory', 'memory.max',
                       'memory.limit_in_bytes'))
    mapping = pathlib.Path(f'/proc/{pid}/uid_map').read_text().split()
    disk = info['disk']
    rows = [
        ('container', f'{uuid} ({info["state"]})'),
        ('init', f'pid {pid} on the host, with the host\'s user id '
         f'{mapping[1]} where the guest sees 0'),
        ('processes', f'{memory.processes} of at most '
         f'{_limit(cgroup, "pids", "pids.max", "pids.max")}'),
        ('CPU limit', _cpu_limit(cgroup)),
        ('memory limit', f'{limit / MIB:.0f} MiB'),
        ('memory: its processes', f'{memory.anonymous / MIB:.1f} MiB'),
        ('memory: page cache', f'{memory.page_cache / MIB:.1f} MiB '
         '(reclaimable)'),
        ('memory: kernel', f'{memory.kernel / MIB:.1f} MiB'),
        ('root disk', f'{disk["used_bytes"] / MIB:.0f} MiB used, '
         f'{disk["free_bytes"] / MIB:.0f} MiB free, limit by '
         f'{disk["method"]}' if disk['used_bytes'] is not None else
         f'not limited ({disk["method"]})'),
        *((f'port {nic["devname"]}', f'{nic["mac"]}, MTU {nic["mtu"]}')
          for nic in info['nics']),
    ]
    table = prettytable.PrettyTable(header=False)
    table.align = 'l'
    table.add_rows(rows)
    print(table)
    pathlib.Path(results).write_text(
        f'instance_anonymous_bytes {memory.anonymous}\n'
        f'instance_page_cache_bytes {memory.page_cache}\n'
        f'instance_kernel_bytes {memory.kernel}\n')
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv))
