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

"""What the caller asks for: the spec of a container, checked.
"""

import base64
import binascii
import dataclasses
import pathlib
import re
import typing as ty

from nova_pycontainer.runtime import blockio
from nova_pycontainer.runtime import cgroup
from nova_pycontainer.runtime import config as rconfig
from nova_pycontainer.runtime import cpuset
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import network
from nova_pycontainer.runtime import volume

#: Smallest memory limit that lets the OCI runtime itself start.
_MIN_MEMORY = 8 << 20
_HOSTNAME = re.compile(r'[^A-Za-z0-9.-]')
_MAX_CONFIG_DRIVE = 64 << 20


def _invalid(text: str) -> errors.ContainerError:
    return errors.ContainerError('invalid', text)


def _optional_int(data: ty.Mapping[str, ty.Any], key: str, low: int,
                  high: int = 1 << 62) -> int | None:
    value = data.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool):
        raise _invalid(f'{key} is {value!r}, not a number')
    if not low <= value <= high:
        raise _invalid(f'{key} is {value}, not within {low} and {high}')
    return value


def _object(data: ty.Mapping[str, ty.Any], key: str) -> dict[str, ty.Any]:
    value = data.get(key) or {}
    if not isinstance(value, dict):
        raise _invalid(f'{key} is no object')
    return value


def _io(resources: ty.Mapping[str, ty.Any]) -> blockio.Limits:
    values = _object(resources, 'disk_io')
    return blockio.Limits(**{
        field.name: _optional_int(values, field.name, 1)
        for field in dataclasses.fields(blockio.Limits)})


def _nics(data: ty.Mapping[str, ty.Any]) -> tuple[network.Nic, ...]:
    value = data.get('nics') or []
    if not isinstance(value, list | tuple):
        raise _invalid('nics is no list')
    return tuple(network.Nic.from_dict(nic) for nic in value)


@dataclasses.dataclass(frozen=True)
class Spec:
    """One container as the caller wants it. Sizes are bytes."""

    name: str
    hostname: str
    image_id: str
    layer: str
    limits: cgroup.Limits
    vcpus: int
    cpus: cpuset.Wanted
    disk_bytes: int | None
    nics: tuple[network.Nic, ...]
    volumes: tuple[volume.Volume, ...]
    #: The volume that its root is; ``layer`` is empty then.
    root: volume.Volume | None
    init_argv: list[str] | None
    init_env: dict[str, str]
    stop_signal: str | None
    nesting: bool

    @classmethod
    def from_dict(cls, data: ty.Mapping[str, ty.Any]) -> 'Spec':
        """:raises ContainerError: ``invalid``, naming the field"""
        resources = _object(data, 'resources')
        init = _object(data, 'init')
        argv = init.get('argv')
        env = init.get('env') or {}
        if argv is not None and not (
                isinstance(argv, list) and argv and
                all(isinstance(a, str) and '\0' not in a for a in argv) and
                argv[0].startswith('/')):
            raise _invalid(f'init.argv is {argv!r}, not a list that starts '
                           'with an absolute path')
        if not (isinstance(env, dict) and all(
                isinstance(v, str) and '\0' not in v and '=' not in k
                for k, v in env.items())):
            raise _invalid('init.env is not a map of strings')
        vcpus = _optional_int(resources, 'vcpus', 1, 8192) or 1
        period = _optional_int(
            resources, 'cpu_period_us', 1000, 1000000) or 100000
        quota = _optional_int(resources, 'cpu_quota_us', 1000)
        shares = _optional_int(resources, 'cpu_shares', 2, 262144)
        limits = cgroup.Limits(
            memory_bytes=_optional_int(
                resources, 'memory_bytes', _MIN_MEMORY),
            swap_bytes=_optional_int(resources, 'swap_bytes', 0) or 0,
            # A guest with n vCPUs gets no more than n CPUs' time, as a
            # virtual machine would.
            cpu_quota_us=quota or vcpus * period,
            cpu_period_us=period,
            cpu_shares=shares or min(1024 * vcpus, 262144),
            pids_max=_optional_int(resources, 'pids_max', 16),
            io=_io(resources))
        root = (volume.Volume.from_dict(data['root'])
                if data.get('root') is not None else None)
        return cls(
            name=str(data.get('name') or ''),
            hostname=_HOSTNAME.sub(
                '-', str(data.get('hostname') or 'container'))[:63],
            image_id=str(data.get('image_id') or ''),
            layer=('' if root else
                   rconfig.check_layer_key(data.get('layer'))),
            limits=limits,
            vcpus=vcpus,
            cpus=cpuset.Wanted.from_dict(_object(resources, 'cpus')),
            disk_bytes=_optional_int(resources, 'disk_bytes', 1 << 20),
            nics=_nics(data),
            volumes=volume.parse(data.get('volumes') or []),
            root=root,
            init_argv=argv,
            init_env=dict(env),
            stop_signal=init.get('stop_signal'),
            nesting=bool(data.get('nesting', False)))


def write_config_drive(
    directory: pathlib.Path, files: ty.Mapping[str, str]
) -> None:
    """Write the files of a config drive, given in base64.

    Readable by the guest's root alone, since user data holds secrets; the
    caller gives the tree to the guest.

    :raises ContainerError: ``invalid``
    """
    total = 0
    for name, encoded in files.items():
        path = pathlib.PurePosixPath(name)
        if path.is_absolute() or '..' in path.parts or not path.parts:
            raise _invalid(f'config drive: {name!r} is not a relative path')
        try:
            content = base64.b64decode(encoded, validate=True)
        except (binascii.Error, ValueError, TypeError) as e:
            raise _invalid(f'config drive: {name}: {e}') from e
        total += len(content)
        if total > _MAX_CONFIG_DRIVE:
            raise _invalid('the config drive has more than '
                           f'{_MAX_CONFIG_DRIVE} bytes')
        target = directory / path
        target.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        target.write_bytes(content)
        target.chmod(0o400)
