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

"""Limits on what a container reads from and writes to block devices.

They hold for each device apart, and for whole disks: the block layer accounts
for no partitions. With cgroup v1 the kernel does not know whose data it writes
back later, so that only what a guest writes synchronously (O_DIRECT, O_SYNC)
is limited there; with v2 all is.
"""

import dataclasses
import os
import pathlib

from nova_pycontainer.runtime import errors

#: Files of cgroup v1's controller, and the fields of ``io.max``, in the order
#: of the limits.
_V1 = ('read_bps', 'write_bps', 'read_iops', 'write_iops')
_V2 = ('rbps', 'wbps', 'riops', 'wiops')


@dataclasses.dataclass(frozen=True)
class Limits:
    """In bytes, and requests, per second; None: no limit."""

    read_bytes_s: int | None = None
    write_bytes_s: int | None = None
    read_iops: int | None = None
    write_iops: int | None = None

    def __bool__(self) -> bool:
        return any(value is not None for value in dataclasses.astuple(self))


def number(device: int) -> str:
    """A device number as the kernel's files have it: ``major:minor``."""
    return f'{os.major(device)}:{os.minor(device)}'


def disk_of(device: int) -> str | None:
    """The whole disk that a device number is of, as ``major:minor``.

    :returns: None: it is of no block device, as with btrfs
    """
    if os.major(device) == 0:
        return None
    directory = pathlib.Path('/sys/dev/block', number(device))
    if not (directory / 'partition').exists():
        return number(device)
    return (directory.resolve().parent / 'dev').read_text().strip()


def set_v1(directory: pathlib.Path, disk: str, limits: Limits) -> None:
    """:param directory: the container's, of the controller ``blkio``"""
    for name, value in zip(
            _V1, dataclasses.astuple(limits), strict=True):
        # Zero removes a limit.
        (directory / f'blkio.throttle.{name}_device').write_text(
            f'{disk} {value or 0}')


def set_v2(directory: pathlib.Path, disk: str, limits: Limits) -> None:
    """:raises ContainerError: ``unsupported``: the controller is not on"""
    file = directory / 'io.max'
    if not file.exists():
        try:
            (directory.parent / 'cgroup.subtree_control').write_text('+io')
        except OSError as e:
            raise errors.ContainerError(
                'unsupported', 'the limits on disks cannot be set',
                cause=str(e), remedy='Have the io controller delegated to '
                f'{directory.parent}') from e
    values = ' '.join(
        f'{name}={"max" if value is None else value}' for name, value in zip(
            _V2, dataclasses.astuple(limits), strict=True))
    file.write_text(f'{disk} {values}')


def oci(disks: list[str], limits: Limits) -> dict[str, object]:
    """``linux.resources.blockIO`` of the OCI runtime specification."""
    names = ('throttleReadBpsDevice', 'throttleWriteBpsDevice',
             'throttleReadIOPSDevice', 'throttleWriteIOPSDevice')
    found: dict[str, object] = {}
    for name, value in zip(names, dataclasses.astuple(limits), strict=True):
        if value is not None:
            found[name] = [
                {'major': int(disk.split(':')[0]),
                 'minor': int(disk.split(':')[1]), 'rate': value}
                for disk in disks]
    return found
