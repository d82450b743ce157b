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

"""The power of a compute host.

Off: everything in it ends at once, and nobody is asked. On: it boots, with
nothing but what is on its disk.
"""

import signal
import subprocess
import time

from cloud import config
from cloud import down
from cloud import graph
from cloud import hosts
from cloud import layout
from cloud import network
from cloud import process
from cloud import services

#: Until the kernel has taken the processes and the links away.
_GONE = 20.0


def _processes(host: str, keep: int) -> set[int]:
    """All of the host, those of its containers among them."""
    found = set(hosts.members(host))
    for top in down.cgroup_dirs(host):
        found.update(down.cgroup_pids(top))
    return {pid for pid in found
            if pid != keep and process.start_time(pid) is not None}


def _kill(host: str) -> None:
    keep = hosts.pid(host)
    deadline = time.monotonic() + _GONE
    while pids := _processes(host, keep):
        for pid in pids:
            process.signal_quietly(pid, signal.SIGKILL)
        for top in down.cgroup_dirs(host):
            down.thaw(top)
        if time.monotonic() > deadline:
            raise process.CloudError(
                f'{host}: processes do not end: {sorted(pids)}')


def off(host: str) -> None:
    """:raises process.CloudError: the host is not up"""
    keep = hosts.pid(host)
    # A machine without power sends no last words, as the sockets of killed
    # processes do.
    for name in (f'ul-{host}', f'x-{host}'):
        hosts.run(layout.CONTROLLER, ['ip', 'link', 'set', name, 'down'])
    hosts.run(host, ['ip', 'link', 'set', 'mig0', 'down'])
    # Whoever starts programs goes first.
    records = [r for r in process.records()
               if r.host == host and r.pid != keep]
    for record in records:
        if record.alive:
            process.signal_quietly(record.pid, signal.SIGKILL)
    _kill(host)
    for record in records:
        record.forget()
    process.stop([hosts.pause_name(host)], number=signal.SIGKILL)
    (layout.RUN / f'{host}.namespaces').unlink(missing_ok=True)
    left = down.remove_cgroups(host) + down.detach_loops((host,))
    if left:
        raise process.CloudError('left behind: ' + ', '.join(left))
    graph.say(f'{host} has no power')


def _no_link(host: str, name: str) -> None:
    """The kernel removes links some time after their namespaces."""
    subprocess.run(hosts.enter(host, ['ip', 'link', 'del', name]),
                   capture_output=True, timeout=30)


def on(host: str, driver: str) -> None:
    """Boot the host, and start what runs there.

    :raises process.CloudError: it is up
    """
    if process.alive(hosts.pause_name(host)):
        raise process.CloudError(f'{host} has power')
    hosts.create(host)
    for name in (f'ul-{host}', f'x-{host}'):
        _no_link(layout.CONTROLLER, name)
    network.link_compute(host)
    others = [other for other in layout.COMPUTES
              if other != host and process.alive(hosts.pause_name(other))]
    if others:
        for other in layout.COMPUTES:
            _no_link(other, 'mig0')
        network.link_migration()
    config.write_compute(host, driver)
    network.start_ovs(host)
    network.start_ovn_controller(host)
    known = services.all_services(driver)
    for name in ('lxcfs', 'agent', 'metadata-agent', 'nova-compute'):
        service = known.get(f'{host}.{name}')
        if service is not None:
            service.start()
    graph.say(f'{host} is up')
