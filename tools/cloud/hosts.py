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

"""Hosts as namespaces.

A host is a network, a mount and a UTS namespace, held by a process that does
nothing. ``ip netns exec`` will not do: it remounts /sys and thereby hides
/sys/fs/cgroup, and plain ``nsenter --net`` shows the network devices of the
wrong namespace in /sys/class/net. So each host has its own sysfs, its own
/run, and overlays over /etc and /var/lib, which leave the machine's own
files alone. Processes and cgroups are shared by the hosts: each has its own
cgroup parent.

Compute hosts see pure cgroup v2 at /sys/fs/cgroup, whatever the machine has:
OCI runtimes refuse a hybrid hierarchy. Controllers that are bound to
v1 hierarchies on this machine appear at /run/cgroup1/<controller>.
"""

import os
import pathlib
import shlex
import shutil
import subprocess
import time

from cloud import layout
from cloud import process

V1_CONTROLLERS = ('memory', 'cpu', 'cpuacct', 'cpuset', 'pids', 'blkio',
                  'freezer', 'devices')


def pause_name(host: str) -> str:
    return f'{host}.pause'


def pid(host: str) -> int:
    record = process.Record.load(pause_name(host))
    if record is None or not record.alive:
        raise process.CloudError(f'host {host} is not up')
    return record.pid


def root(host: str) -> pathlib.Path:
    """The host's file system as seen from here."""
    return pathlib.Path(f'/proc/{pid(host)}/root')


def enter(host: str, argv: list[str], user: str | None = None) -> list[str]:
    """argv, wrapped to run inside the host (as this user)."""
    wrapped = ['nsenter', '--target', str(pid(host)), '--net', '--uts',
               '--mount', '--']
    if user:
        wrapped += ['setpriv', f'--reuid={user}', f'--regid={user}',
                    '--init-groups', '--']
    return wrapped + [str(arg) for arg in argv]


def run(host: str, argv: list[str], user: str | None = None,
        env: dict[str, str] | None = None, timeout: float = 120,
        log: str | None = None) -> str:
    """Runs a command inside the host; returns its standard output."""
    environ = {'PATH': f'{layout.VENV}/bin:/usr/sbin:/usr/bin:/sbin:/bin',
               'LANG': 'C.UTF-8', 'HOME': '/', **(env or {})}
    done = subprocess.run(enter(host, argv, user), env=environ,
                          stdin=subprocess.DEVNULL, capture_output=True,
                          text=True, timeout=timeout)
    if log:
        layout.LOGS.mkdir(parents=True, exist_ok=True)
        with open(process.log_path(log), 'a') as out:
            out.write(f'=== {shlex.join(map(str, argv))}\n{done.stdout}'
                      f'{done.stderr}\n=== exit code {done.returncode}\n')
    if done.returncode:
        text = shlex.join(map(str, argv))
        if log:
            raise process.ServiceError(
                log, f'exit code {done.returncode} of {text}')
        raise process.CloudError(
            f'{host}: exit code {done.returncode} of {text}\n'
            f'{done.stdout}{done.stderr}')
    return done.stdout


def script(host: str, text: str) -> None:
    run(host, ['bash', '-euc', text])


def write(host: str, path: str, text: str, mode: int = 0o644,
          owner: str | None = None) -> None:
    """Writes a file inside the host."""
    target = root(host) / path.lstrip('/')
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode),
              'w') as out:
        out.write(text)
    target.chmod(mode)
    if owner:
        os.chown(target, layout.uid(owner), layout.gid(owner))


def make_dir(host: str, path: str, mode: int = 0o755,
             owner: str | None = None) -> None:
    target = root(host) / path.lstrip('/')
    target.mkdir(parents=True, exist_ok=True)
    target.chmod(mode)
    if owner:
        os.chown(target, layout.uid(owner), layout.gid(owner))


def _v1_mounts() -> dict[str, str]:
    """Mount points of cgroup v1 controllers on this machine."""
    found = {}
    for line in pathlib.Path('/proc/self/mountinfo').read_text().splitlines():
        left, _, right = line.partition(' - ')
        kind, _, options = right.split(maxsplit=2)
        if kind == 'cgroup':
            for option in options.split(','):
                if option in V1_CONTROLLERS:
                    found[option] = left.split()[4]
    return found


def _mounts(host: str) -> str:
    """The script that arranges the host's file systems."""
    base = layout.HOSTS / host
    lines = ['mount --make-rprivate /', f'hostname {host}']
    for path, name in (('/etc', 'etc'), ('/var/lib', 'varlib')):
        lines.append(
            f'mount -t overlay -o lowerdir={path},upperdir={base}/{name},'
            f'workdir={base}/{name}.work pyc-{host} {path}')
    # /run: what was mounted below it would still show in mountinfo.
    lines += ['umount -Rl /run 2>/dev/null || true',
              f'mount -t tmpfs -o mode=755 pyc-{host} /run',
              'mkdir -p /run/lock /run/netns /run/openvswitch /run/ovn'
              ' /run/cgroup1',
              'mkdir /run/tmp',
              'chmod 1777 /run/lock /run/tmp',
              # ip netns wants it shared, among the processes of this host.
              'mount --bind /run/netns /run/netns',
              'mount --make-shared /run/netns']
    v1 = _v1_mounts()
    if host == layout.CONTROLLER:
        lines += ['mkdir -p /run/cgroup1/all',
                  'mount --rbind /sys/fs/cgroup /run/cgroup1/all']
    else:
        for controller, path in v1.items():
            lines += [f'mkdir /run/cgroup1/{controller}',
                      f'mount --bind {path} /run/cgroup1/{controller}']
    lines += ['umount -Rl /sys',
              'mount -t sysfs sysfs /sys']
    if host == layout.CONTROLLER:
        lines += ['mount --rbind /run/cgroup1/all /sys/fs/cgroup',
                  'umount -Rl /run/cgroup1/all']
    else:
        lines.append('mount -t cgroup2 cgroup2 /sys/fs/cgroup')
    state = layout.DATA / host
    for name in ('nova', 'pycontainer'):
        lines += [f'mkdir -p /var/lib/{name}',
                  f'mount --bind {state}/{name} /var/lib/{name}']
    # A disk of its own for the instances, of a host that has one.
    disk = '/var/lib/pycontainer/instances'
    lines.append(f'if [ -e {disk}.img ]; then mount -o loop {disk}.img '
                 f'{disk}; fi')
    return '\n'.join(lines)


def create(host: str) -> None:
    """Makes the host, if it is not there, without its network."""
    name = pause_name(host)
    if process.alive(name):
        return
    base = layout.HOSTS / host
    shutil.rmtree(base, ignore_errors=True)
    for part in ('etc', 'etc.work', 'varlib', 'varlib.work'):
        (base / part).mkdir(parents=True)
    state = layout.DATA / host
    for part, owner in (('nova', layout.USER), ('pycontainer', 'root')):
        (state / part).mkdir(parents=True, exist_ok=True)
        os.chown(state / part, layout.uid(owner), layout.gid(owner))
    record = process.spawn(
        name, ['unshare', '--net', '--mount', '--uts', '--propagation',
               'private', '--', 'sleep', 'infinity'], host)
    own = os.readlink('/proc/self/ns/mnt')
    process.wait_ready(
        name, lambda: (
            os.readlink(f'/proc/{record.pid}/ns/mnt') != own and
            pathlib.Path(f'/proc/{record.pid}/comm').read_text().strip() ==
            'sleep'), timeout=10, interval=0.01)
    # down finds by them whatever was started inside.
    (layout.RUN / f'{host}.namespaces').write_text(' '.join(
        os.readlink(f'/proc/{record.pid}/ns/{kind}')
        for kind in ('mnt', 'uts')))
    script(host, _mounts(host))
    names = ''.join(f'{layout.UNDERLAY[other]} {other}\n'
                    for other in layout.ALL_HOSTS)
    write(host, '/etc/hosts', '127.0.0.1 localhost\n' + names)
    write(host, '/etc/hostname', host + '\n')
    script(host, 'ip link set lo up')


def known(host: str) -> bool:
    """Whether the host was made, and not yet taken away."""
    return (layout.RUN / f'{host}.namespaces').exists()


def members(host: str) -> list[int]:
    """Processes in the host, started here or not.

    The mount namespace alone does not tell: ``ip netns exec`` gives what it
    starts (haproxy, for the metadata service) another one.
    """
    try:
        mount, name = (layout.RUN /
                       f'{host}.namespaces').read_text().split()
    except FileNotFoundError:
        return []
    found = []
    for pid in os.listdir('/proc'):
        if pid.isdigit():
            try:
                if (os.readlink(f'/proc/{pid}/ns/mnt') == mount or
                        os.readlink(f'/proc/{pid}/ns/uts') == name):
                    found.append(int(pid))
            except OSError:
                pass
    return found


def wait_gone(pids: list[int], timeout: float) -> list[int]:
    deadline = time.monotonic() + timeout
    while pids and time.monotonic() < deadline:
        time.sleep(0.02)
        pids = [pid for pid in pids if process.start_time(pid) is not None]
    return pids
