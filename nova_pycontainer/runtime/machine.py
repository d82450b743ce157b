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

"""What the machine has, whatever runs on it."""

import functools
import os
import pathlib
import platform
import shutil
import socket
import typing as ty

from nova_pycontainer.runtime import cpuset
from nova_pycontainer.runtime.migration import compatibility


def info(directory: pathlib.Path) -> dict[str, ty.Any]:
    """Its part of what an agent says of its host. Sizes are bytes.

    :param directory: on the disk that the containers are on
    """
    usage = shutil.disk_usage(directory)
    with open('/proc/meminfo') as f:
        memory = {line.split(':')[0]: int(line.split()[1]) * 1024
                  for line in f}
    with open('/proc/uptime') as f:
        uptime = float(f.read().split()[0])
    return {
        'hostname': socket.gethostname(),
        'architecture': platform.machine(),
        'kernel': platform.release(),
        'cpus': os.cpu_count() or 1,
        'numa': [node.to_dict() for node in cpuset.nodes()],
        'cpu_flags': [*_cpu_flags()],
        'memory_bytes': memory['MemTotal'],
        'memory_available_bytes': memory['MemAvailable'],
        'disk_total_bytes': usage.total,
        'disk_free_bytes': usage.free,
        'uptime_s': uptime,
    }


@functools.cache
def _cpu_flags() -> tuple[str, ...]:
    # They stay; /proc/cpuinfo has pages of them for each CPU.
    return tuple(compatibility.cpu()['flags'])
