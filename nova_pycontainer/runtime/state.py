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

"""What is kept on disk of an instance: ``state.json`` and ``exit.json``.
"""

import dataclasses
import json
import os
import pathlib
import tempfile
import typing as ty

from nova_pycontainer.runtime import errors

Data = dict[str, ty.Any]

#: 2: offers and what comes in by one, of cold migrations. 3: volumes. 4: what
#: releases of format 3 came to write, and earlier ones of them get wrong: a
#: resume that is past ("resumed", which they would begin again), limits of
#: disks and interfaces (which they would not set), files of lxcfs and
#: /dev/fuse in checkpoints.
FORMAT = 4


def _format_4(data: Data) -> Data:
    """A resume was "restoring" until the agent knew that the guest ran; now
    it is so only while the guest cannot have run. Which of both, the kernel
    says; see :meth:`.checkpoints.Checkpoints.recover`.
    """
    suspended = data.get('suspended')
    if isinstance(suspended, dict) and suspended.get('phase') == 'restoring':
        data = data | {'suspended': suspended | {'phase': 'undecided'}}
    return data | {'format': 4}


#: Upgrades of older formats: number → function that returns the next one.
#: Each gets every kind of file that has a format.
_UPGRADES: dict[int, ty.Callable[[Data], Data]] = {
    1: lambda data: data | {'format': 2},
    2: lambda data: data | {'format': 3},
    3: _format_4,
}


def write_json(path: pathlib.Path, data: ty.Mapping[str, ty.Any]) -> None:
    """Write atomically and durably: after a power loss old or new is there.
    """
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.')
    try:
        with os.fdopen(fd, 'w') as f:
            json.dump(data, f, indent=1, sort_keys=True)
            f.flush()
            os.fsync(f.fileno())
        os.rename(name, path)
    except BaseException:
        os.unlink(name)
        raise
    fsync_dir(path.parent)


def fsync_dir(path: pathlib.Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def read_json(path: pathlib.Path) -> dict[str, ty.Any]:
    """Read a file that has a ``format`` number.

    :raises ContainerError: ``unsupported`` for an unknown format, ``internal``
        for a damaged file
    :raises FileNotFoundError: it is not there
    """
    try:
        data = json.loads(path.read_text())
        number = int(data['format'])
    except (ValueError, KeyError, TypeError, OverflowError) as e:
        raise errors.ContainerError(
            'internal', f'{path} is damaged', cause=str(e),
            remedy='Restore it from a backup, or delete the instance') from e
    while number != FORMAT:
        upgrade = _UPGRADES.get(number)
        if upgrade is None:
            raise errors.ContainerError(
                'unsupported',
                f'{path} has format {number}, this release reads up to '
                f'{FORMAT}',
                remedy='Install the release that wrote it, or a newer one')
        data = upgrade(data)
        number = data['format']
    return ty.cast(dict[str, ty.Any], data)


@dataclasses.dataclass
class Exit:
    """How an init ended; all None: it was not seen (a crash of the host)."""

    code: int | None = None
    signal: int | None = None
    at: float | None = None
    oom: bool = False

    @classmethod
    def from_dict(cls, data: ty.Mapping[str, ty.Any]) -> 'Exit':
        return cls(data.get('code'), data.get('signal'), data.get('at'),
                   bool(data.get('oom', False)))

    def to_dict(self) -> dict[str, ty.Any]:
        return dataclasses.asdict(self)


@dataclasses.dataclass
class State:
    """``state.json``.

    :param run: facts of the running container (process, cgroup, init), or
        None while there is none
    """

    uuid: str
    spec: dict[str, ty.Any]
    base_id: int
    disk_method: str
    created_at: float
    run: dict[str, ty.Any] | None = None
    exit: Exit | None = None
    #: It runs on another host, and must not be started here again.
    moved: dict[str, ty.Any] | None = None
    #: The migration that it came with, and from whom: its source may ask.
    arrived: dict[str, ty.Any] | None = None
    #: How far its checkpoint is; see :mod:`.checkpoints`.
    suspended: dict[str, ty.Any] | None = None
    #: What is different about it while it is being rescued.
    rescue: dict[str, ty.Any] | None = None
    #: Who may read it, to have it on another host; see :mod:`.transfers`.
    offered: dict[str, ty.Any] | None = None
    #: From where its files come: it is of no use before all have.
    incoming: dict[str, ty.Any] | None = None
    #: It was deleted but for its files, until it is prepared again.
    kept: bool = False

    def save(self, directory: pathlib.Path) -> None:
        data = dataclasses.asdict(self)
        data['format'] = FORMAT
        write_json(directory / 'state.json', data)

    @classmethod
    def load(cls, directory: pathlib.Path) -> 'State':
        data = read_json(directory / 'state.json')
        data.pop('format')
        ended = data.pop('exit', None)
        try:
            return cls(
                **data, exit=Exit.from_dict(ended) if ended else None)
        except (AttributeError, TypeError) as e:
            raise errors.ContainerError(
                'internal', f'{directory}/state.json is damaged',
                cause=str(e)) from e
