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

"""Takes the cloud down; nothing of it is left but the data."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import time

from cloud import graph
from cloud import hosts
from cloud import layout
from cloud import network
from cloud import process

#: Stopped after the others, which would log failures for want of them.
LAST = ('mariadb', 'rabbitmq', 'memcached')


def cgroup_dirs(host: str) -> list[pathlib.Path]:
    """The host's parent cgroups in every hierarchy of this machine."""
    parent = layout.CGROUP_PARENT.format(host=host)
    found = []
    for line in pathlib.Path('/proc/self/mountinfo').read_text().splitlines():
        left, _, right = line.partition(' - ')
        if right.split()[0] in ('cgroup', 'cgroup2'):
            path = pathlib.Path(left.split()[4]) / parent
            if path.is_dir():
                found.append(path)
    return found


def cgroup_pids(top: pathlib.Path) -> list[int]:
    pids = []
    for path, _, files in os.walk(top):
        if 'cgroup.procs' in files:
            try:
                pids += (pathlib.Path(path) /
                         'cgroup.procs').read_text().split()
            except OSError:
                pass
    return [int(pid) for pid in pids]


def thaw(top: pathlib.Path) -> None:
    """A frozen process of cgroup v1 does not die before it is thawed."""
    for path, _, files in os.walk(top):
        for name, value in (('freezer.state', 'THAWED'),
                            ('cgroup.freeze', '0')):
            if name in files:
                try:
                    (pathlib.Path(path) / name).write_text(value)
                except OSError:
                    pass


def remove_cgroups(host: str) -> list[str]:
    """Kills the containers that are left and removes their cgroups."""
    tops = cgroup_dirs(host)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        pids = {pid for top in tops for pid in cgroup_pids(top)}
        if not pids:
            break
        for pid in pids:
            process.signal_quietly(pid, signal.SIGKILL)
        for top in tops:
            thaw(top)
        time.sleep(0.05)
    left = []
    for top in tops:
        for path, _, _ in os.walk(top, topdown=False):
            for _ in range(20):
                try:
                    os.rmdir(path)
                    break
                except FileNotFoundError:
                    break
                except OSError:
                    time.sleep(0.05)
            else:
                left.append(f'cgroup {path}')
    return left


def _is_ours(backing: str, inode: int, names: tuple[str, ...]) -> bool:
    """Whether a loop device's file lies in the state of one of these hosts.

    The path is that which the host saw, or what is left of it once the
    host's mounts are gone; and an agent of the machine itself would use the
    same. So the inode decides.
    """
    path = pathlib.Path(backing)
    state = pathlib.Path('/var/lib/pycontainer')
    if path.is_relative_to(layout.CLOUD):
        return any(path.is_relative_to(layout.DATA / host)
                   for host in names) or names == layout.COMPUTES
    if path.is_relative_to(state):
        rest = path.relative_to(state)
    else:
        rest = path.relative_to('/')
    for host in names:
        try:
            found = (layout.DATA / host / 'pycontainer' / rest).stat()
        except OSError:
            continue
        if found.st_ino == inode:
            return True
    return False


def detach_loops(names: tuple[str, ...] = layout.COMPUTES) -> list[str]:
    """Detaches the loop devices of hosts; returns what is still attached."""
    columns = ('losetup', '--json', '--output', 'NAME,BACK-FILE,BACK-INO')
    for attempt in range(20):
        done = subprocess.run(columns, capture_output=True, text=True)
        if done.returncode or not done.stdout.strip():
            return []
        left = [device['name']
                for device in json.loads(done.stdout)['loopdevices']
                if device['back-file'] and
                _is_ours(device['back-file'], int(device['back-ino']), names)]
        if not left:
            return []
        if attempt == 0:
            for name in left:
                subprocess.run(['losetup', '--detach', name],
                               capture_output=True)
            continue
        # Until the last mount of it is gone.
        time.sleep(0.1)
    return left


def down(purge: bool = False) -> None:
    records = process.records()
    names = [record.name for record in records]
    pauses = [name for name in names if name.endswith('.pause')]
    computes = [name for name in names if name.endswith('.nova-compute')]
    last = [name for name in names if name in LAST]
    rest = [name for name in names
            if name not in (*pauses, *computes, *last)]
    if names:
        graph.say(f'stopping {len(names)} processes')
    process.stop(computes, grace=5)
    process.stop(rest, grace=5)
    process.stop(last, grace=20)
    # Whatever else was started inside the hosts: workers, haproxy, epmd,
    # the keeper, shells. A container's own processes are in its cgroup.
    left: list[str] = []
    for host in layout.ALL_HOSTS:
        if not hosts.known(host):
            # Not of this cloud, whatever there is by that name.
            continue
        keep = process.Record.load(hosts.pause_name(host))
        pids = [pid for pid in hosts.members(host)
                if not keep or pid != keep.pid]
        for number, grace in ((signal.SIGTERM, 0.5), (signal.SIGKILL, 3.0)):
            for pid in pids:
                process.signal_quietly(pid, number)
            pids = hosts.wait_gone(pids, grace)
        left += [f'process {pid} on {host}' for pid in pids]
        left += remove_cgroups(host)
    # With the last process of a namespace all mounts and links in it go.
    process.stop(pauses, grace=2, number=signal.SIGKILL)
    network.unlink_controller()
    left += detach_loops()
    for path in (layout.RUN, layout.HOSTS):
        shutil.rmtree(path, ignore_errors=True)
    if purge:
        created = (layout.DATA / 'user-created').exists()
        shutil.rmtree(layout.CLOUD, ignore_errors=True)
        shutil.rmtree(layout.LOGS, ignore_errors=True)
        if created:
            subprocess.run(['userdel', layout.USER], capture_output=True)
        if layout.CLOUD.exists():
            left.append(f'files in {layout.CLOUD}')
    if left:
        raise process.CloudError('left behind: ' + ', '.join(left))
    graph.say('the cloud is down' + (', its data removed' if purge else ''))
