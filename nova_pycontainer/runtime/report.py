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

"""What is told of a container."""

import typing as ty

from nova_pycontainer.runtime import cgroup
from nova_pycontainer.runtime import network
from nova_pycontainer.runtime import volume

if ty.TYPE_CHECKING:
    from nova_pycontainer.runtime import container


def of(item: 'container.Container') -> dict[str, ty.Any]:
    """Everything that it is and has. Sizes are bytes."""
    run = item.st.run
    current = item.status()
    live = current in ('created', 'running', 'paused')
    usage = (item.cgroup.usage() if live
             else cgroup.Usage(0, 0, 0, 0))
    used = item.disk.usage()
    return _recorded(item) | {
        'state': current,
        'pid': run['process']['pid'] if run and live else None,
        'cpu_time_ns': usage.cpu_time_ns,
        'cpus': sorted(item.cgroup.cpus() or ()) if live else None,
        'memory_bytes': usage.memory_bytes,
        'pids': usage.pids,
        'oom_kills': usage.oom_kills,
        'nics': [
            nic.to_dict() | {'statistics': network.statistics(nic)}
            for nic in item.spec.nics],
        'volumes': [
            v.to_dict() | {'statistics': volume.statistics(v)}
            for v in item.spec.volumes],
        'root': _root(item),
        'disk': {'method': item.disk.method,
                 'used_bytes': used[0] if used else None,
                 'free_bytes': used[1] if used else None},
        'started_at': run['started_at'] if run and live else None,
    }


def unknown(item: 'container.Container') -> dict[str, ty.Any]:
    """What is written down of one that cannot be looked at.

    Whether it runs is not known; it has what it is written to have.
    """
    root = item.st.spec.get('root')
    return _recorded(item) | {
        'state': 'unknown', 'pid': None, 'cpu_time_ns': 0, 'cpus': None,
        'memory_bytes': 0, 'pids': 0, 'oom_kills': 0,
        'nics': [nic.to_dict() | {'statistics': None}
                 for nic in item.spec.nics],
        'volumes': [v.to_dict() | {'statistics': None}
                    for v in item.spec.volumes],
        'root': volume.Volume.from_dict(root).to_dict() | {
            'statistics': None} if root else None,
        'disk': {'method': item.disk.method, 'used_bytes': None,
                 'free_bytes': None},
        'started_at': None,
    }


def _recorded(item: 'container.Container') -> dict[str, ty.Any]:
    return {
        'uuid': item.uuid,
        'name': item.spec.name,
        'exit': item.st.exit.to_dict() if item.st.exit else None,
        'base_id': item.st.base_id,
        'layer': item.spec.layer,
        'image_id': item.spec.image_id,
        'resources': dict(item.st.spec.get('resources') or {}),
        'created_at': item.st.created_at,
        # It runs on another host; what is here is only left over.
        'moved': item.st.moved,
        # Another host may have it, by this migration.
        'offered': (item.st.offered or {}).get('migration'),
        'kept': item.st.kept,
        # Its files are not all here yet; the same.
        'incoming': (item.st.incoming or {}).get('migration'),
        # By which all of it has come.
        'arrived': (item.st.arrived or {}).get('migration'),
        'rescue': item.st.rescue is not None,
        'spec': {k: v for k, v in item.st.spec.items()
                 if k != 'config_drive'},
    }


def _root(item: 'container.Container') -> dict[str, ty.Any] | None:
    # Also while another root is in place of it.
    if not item.st.spec.get('root'):
        return None
    root = volume.Volume.from_dict(item.st.spec['root'])
    return root.to_dict() | {'statistics': volume.statistics(root)}
