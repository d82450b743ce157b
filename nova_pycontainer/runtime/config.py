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

"""What the runtime has to be told: plain data, without oslo.config.

The agent fills it from its configuration file; tests and scripts directly.
"""

import dataclasses
import pathlib
import re

from nova_pycontainer.runtime import errors

_UUID = re.compile(
    r'[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}')
_LAYER = re.compile(r'[a-z0-9]+-[0-9a-zA-Z]{16,128}')


@dataclasses.dataclass(frozen=True)
class Config:
    """Configuration of one host.

    Sizes are bytes, times seconds.
    """

    state_dir: pathlib.Path = pathlib.Path('/var/lib/pycontainer')
    run_dir: pathlib.Path = pathlib.Path('/run/pycontainer')
    oci_runtime_path: str = 'crun'
    criu_path: str = 'criu'
    #: Parent of all containers' cgroups, relative to the hierarchy's root.
    cgroup_parent: str = 'pycontainer'
    #: ``auto``, ``cgroupfs`` or ``systemd``: who makes a container's cgroup.
    cgroup_manager: str = 'auto'
    #: One of :data:`.disk.METHODS`: how DISK_GB is enforced.
    disk_limit: str = 'auto'
    #: Types of file systems on volumes that this host's kernel may mount, see
    #: :mod:`nova_pycontainer.runtime.bootvolume`.
    volume_filesystems: tuple[str, ...] = ()
    #: First host id of the first container's range, and how many ranges of
    #: :data:`nova_pycontainer.runtime.idmap.RANGE` ids there are.
    idmap_base: int = 0x40000000
    idmap_count: int = 8192
    layer_max_entries: int = 1_000_000
    layer_max_bytes: int = 64 << 30
    #: Size limit of one container's console log on disk, both segments.
    console_log_bytes: int = 1 << 20
    #: Limit for one call of the OCI runtime.
    oci_timeout: float = 60.0
    #: ``auto``, ``none``, or where lxcfs is mounted.
    lxcfs_dir: str = 'auto'
    #: Where the listener for consoles is; port 0: any.
    console_listen: str = '127.0.0.1'
    console_port: int = 6084
    #: Where the listener for migrations is, and what others are told.
    migration_listen: str = '0.0.0.0'
    migration_address: str = '127.0.0.1'
    migration_ports: tuple[int, int] = (49352, 49415)
    #: An operator's own CA, this host's certificate and key; None: the host's
    #: own, which is announced through Nova.
    migration_ca: pathlib.Path | None = None
    migration_cert: pathlib.Path | None = None
    migration_key: pathlib.Path | None = None
    #: Python that runs the keeper and the unpacker.
    python: str | None = None

    @property
    def instances_dir(self) -> pathlib.Path:
        return self.state_dir / 'instances'

    @property
    def layers_dir(self) -> pathlib.Path:
        return self.state_dir / 'layers'

    @property
    def keeper_socket(self) -> pathlib.Path:
        return self.run_dir / 'keeper.sock'

    @property
    def oci_root(self) -> pathlib.Path:
        """The OCI runtime's own state: volatile, as the containers are."""
        return self.run_dir / 'oci'


def check_uuid(uuid: object) -> str:
    """Return a uuid that is safe as a directory's name.

    :raises ContainerError: ``invalid``
    """
    if not isinstance(uuid, str) or not _UUID.fullmatch(uuid):
        raise errors.ContainerError(
            'invalid', f'{uuid!r} is not the uuid of an instance')
    return uuid


def check_layer_key(key: object) -> str:
    """Return a layer key that is safe as a directory's name.

    :raises ContainerError: ``invalid``
    """
    if not isinstance(key, str) or not _LAYER.fullmatch(key):
        raise errors.ContainerError(
            'invalid', f'{key!r} is not the key of a layer')
    return key
